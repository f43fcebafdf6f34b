"""`Turn`: what one side of a dialogue about a picture says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says.

    Attributes:
        text: without any placeholder of a picture.
        pictures: how many pictures stand before the text; 0 or 1 in this version.
        learned: whether an assistant's turn is learned; false where the data say `loss: false`.
    """

    role: Role
    text: str
    pictures: int = 0
    learned: bool = True


Dialogue = tuple[Turn, ...]
"""Turns in their order; the last one is the assistant's, the answer."""

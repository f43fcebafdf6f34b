"""`Turn`: what one side of a dialogue about a picture says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]

UNREAD = "yes"
"""The answer of dialogues whose prompt alone is read. A fixed one, so that no reference decides what can be asked."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says.

    Attributes:
        text: without any placeholder of a picture.
        pictures: how many pictures stand before the text; 0 or 1 in this version.
        learned: whether an assistant's turn is learned; false where the data say `loss: false`.
        given: false where the data have no answer and the student is to write one; the text is `UNREAD`.
        rejected: a worse answer to the same prompt, for methods that learn a preference; empty where none is known.
    """

    role: Role
    text: str
    pictures: int = 0
    learned: bool = True
    given: bool = True
    rejected: str = ""


Dialogue = tuple[Turn, ...]
"""Turns in their order; the last one is the assistant's, the answer."""

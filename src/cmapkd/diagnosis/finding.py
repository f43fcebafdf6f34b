"""One thing that the doctor looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A `problem` would stop or spoil the run; a `note` is worth knowing."""

    level: Literal["ok", "note", "problem"]
    what: str
    detail: str

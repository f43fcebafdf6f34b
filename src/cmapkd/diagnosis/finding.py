"""One thing that the doctor looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A `problem` would stop or spoil the run; a `note` is worth knowing."""

    level: Literal["ok", "note", "problem"]
    what: str
    detail: str


def verdict(findings: Sequence[Finding]) -> str:
    """How many problems and notes there are: `2 problems, 1 note`."""
    counts = {level: sum(each.level == level for each in findings) for level in ("problem", "note")}
    return ", ".join(f"{count or 'no'} {level}{'s'[: count != 1]}" for level, count in counts.items())

"""How one run of a comparison, or one trial of its tuning, ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run ended."""

    folder: Path
    status: Literal["finished", "failed", "missing"] = "missing"
    metrics: dict[str, Any] = field(default_factory=dict)  # of metrics.json; the student's with further test data
    error: str | None = None
    diverged: bool = False  # its loss was no number: the run would end so again

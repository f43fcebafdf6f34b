"""Learning curves of runs, from the validations that they logged, and whether a curve still rises at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cmapkd.results import is_finished

LAST_QUARTER = 0.75
_END = 0.95  # a last validation before this share of the steps does not tell how a run ended


def read_validations(folder: Path) -> dict[str, dict[int, float]]:
    """Validation numbers of a finished run: name -> step -> value; empty for other runs, whose curves are cut short."""
    path = folder / "metrics.jsonl"
    if not is_finished(folder) or not path.is_file():
        return {}
    curves: dict[str, dict[int, float]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        for key, value in line.items():
            if key.startswith("validation/"):
                curves.setdefault(key.removeprefix("validation/"), {})[int(line["step"])] = float(value)
    return curves


def late_rise(curve: Mapping[int, float], steps: int) -> float | None:
    """How much a curve rises over the last quarter of the steps, in its own units.

    The value at 3/4 of the steps is interpolated between the validations around it.

    Args:
        curve: step -> value.
        steps: of the whole run.
    Returns:
        None where the validations do not tell: none at or before 3/4 of the steps, or none within the last 5 %.
    """
    start = LAST_QUARTER * steps
    before = [step for step in curve if step <= start]
    after = [step for step in curve if step > start]
    if not before or not after or max(after) < _END * steps:
        return None
    left, right = max(before), min(after)
    at_start = curve[left] + (curve[right] - curve[left]) * (start - left) / (right - left)
    return curve[max(after)] - at_start

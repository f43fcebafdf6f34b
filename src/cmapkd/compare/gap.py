"""The share of the gap to the teacher, and whether the row where the gap begins has learned to its end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cmapkd.compare.curves import late_rise, read_validations
from cmapkd.compare.rows import Row
from cmapkd.evaluation.tasks import TASKS


class GapStart(NamedTuple):
    """What is known of the row where a gap begins."""

    withheld: bool  # its curve still rises by more than is allowed: no share of the gap is shown
    note: str  # says so, or that it was not checked; empty where the curve is flat enough


def check_start(
    row: Row, path: str, steps: Mapping[int, int], folders: Mapping[str, Path], allowed: float | None
) -> GapStart:
    """Whether a row's learning curve is flat enough at its end for a gap to begin there.

    A gap from a row that still learns is a measure of speed, not of what the teacher adds.

    Args:
        path: the metric of the gap, without the name of its test data. Its task's headline is what validations log.
        steps: of the row's finished runs, by seed.
        allowed: points over the last quarter of the steps, in the mean over seeds; None: not checked.
    """
    kind = TASKS.own.get(path.partition(".")[0])
    headline = kind.headline if kind is not None else None
    name = headline.label if headline is not None else "score"
    if headline is not None and headline.unit != "percent":
        note = f"Whether {row.label}, where the gap begins, still rises was not checked: {headline.head} is no percent."
        return GapStart(False, note)
    if allowed is None:
        note = f"Whether {row.label}, where the gap begins, still rises was not checked: gap_rising is none."
        return GapStart(False, note)
    rises = []
    for seed, count in steps.items():
        curve = read_validations(folders[row.runs[seed].digest]).get(name, {})
        if (rise := late_rise(curve, count)) is not None:
            rises.append(rise)
    if not rises:
        return GapStart(
            False,
            f"Whether {row.label}, where the gap begins, still rises was not checked: its runs logged no validation "
            f"of {name} before 3/4 of their steps and at the end (training.evaluate_every).",
        )
    rise = statistics.fmean(rises)
    if rise <= allowed:
        return GapStart(False, "")
    return GapStart(
        True,
        f"Share of the gap withheld: {row.label}, where the gap begins, still rises by {rise:.1f} points of validation "
        f"{name} over the last quarter of its steps, more than gap_rising = {allowed:g}. Train this row longer, or let "
        "the gap begin at another one.",
    )


def share_of_gap(
    values: Mapping[int, float], start: Mapping[int, float], teacher: Mapping[int, float], *, lower_is_better: bool
) -> dict[int, float]:
    """(value - start) / (teacher - start) by seed, of the seeds whose start is worse than the teacher."""
    sign = -1 if lower_is_better else 1
    return {
        seed: (values[seed] - start[seed]) / (teacher[seed] - start[seed])
        for seed in values
        if seed in teacher and seed in start and sign * (teacher[seed] - start[seed]) > 0
    }

"""Tests of the declared contrasts, corrected over all of a comparison's file, and the verdict of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cmapkd.compare.statistics import CONFIDENCE, Estimate, PairedDifference, holm
from cmapkd.config import counted

EXPLORATORY_SEEDS = 3
"""With so many seeds or fewer there are no verdicts, and a table is called exploratory."""

Verdict = Literal["above", "below", "equal", "not resolved"]


@dataclass(frozen=True, slots=True)
class Contrast:
    """A declared difference with its data, not yet tested."""

    arm: str  # label of the row
    against: str
    metric: str
    smallest: float | None  # the smallest difference that matters, in units of the metric
    difference: PairedDifference | None  # None where the rows have no seed in common
    estimate: Estimate | None  # what is tested; None with fewer than two seeds, or without any spread
    family_key: object  # contrasts of equal keys are one test, in whatever tables they stand
    remark: str = ""  # why the estimate covers seeds alone


@dataclass(frozen=True, slots=True)
class TestedContrast:
    """A contrast with its p values and its verdict."""

    contrast: Contrast
    p: float | None  # two-sided, of no difference
    p_holm: float | None
    p_equal: float | None  # of a difference of at least `smallest`: the larger of two one-sided tests
    p_equal_holm: float | None
    verdict: Verdict
    reason: str  # why there can be no verdict; empty otherwise
    family_size: int  # different contrasts of the file, over which p is corrected


def judge(contrasts: Sequence[Contrast]) -> tuple[TestedContrast, ...]:
    """Tests every contrast, and gives verdicts at 5 %.

    `equal`: the difference lies within ± `smallest` (two one-sided tests, Schuirmann 1987). `above`, `below`: the arm's
    number is larger or smaller. `equal` goes first, because a difference below `smallest` does not matter. Holm's
    correction goes over all contrasts, once for the tests of a difference and once for the tests of equality. A
    contrast that could not be computed counts with p = 1, so that the family is the one that was declared.

    Args:
        contrasts: all that one comparison's file declares. Those of equal `family_key` count once.
    """
    keys = [contrast.family_key for contrast in contrasts]
    different = _corrected(keys, [_p_different(contrast) for contrast in contrasts])
    equal = _corrected(keys, [_p_equal(contrast) for contrast in contrasts])
    tested = []
    for contrast, p_holm, p_equal_holm in zip(contrasts, different, equal, strict=True):
        p, p_equal = _p_different(contrast), _p_equal(contrast)
        reason = _reason(contrast)
        verdict: Verdict = "not resolved"
        if not reason and contrast.estimate is not None:
            if p_equal is not None and p_equal_holm < 1 - CONFIDENCE:
                verdict = "equal"
            elif p_holm < 1 - CONFIDENCE:
                verdict = "above" if contrast.estimate.mean > 0 else "below"
        tested.append(
            TestedContrast(
                contrast,
                p,
                None if p is None else p_holm,
                p_equal,
                None if p_equal is None else p_equal_holm,
                verdict,
                reason,
                len(set(keys)),
            )
        )
    return tuple(tested)


def _p_different(contrast: Contrast) -> float | None:
    return None if contrast.estimate is None else contrast.estimate.p_different()


def _p_equal(contrast: Contrast) -> float | None:
    if contrast.estimate is None or contrast.smallest is None:
        return None
    return contrast.estimate.p_within(contrast.smallest)


def _corrected(keys: Sequence[object], p_values: Sequence[float | None]) -> list[float]:
    """Holm-adjusted p of each contrast; an unknown p counts as 1."""
    family = {key: 1.0 if p is None else p for key, p in zip(keys, p_values, strict=True)}
    adjusted = dict(zip(family, holm(list(family.values())), strict=True))
    return [adjusted[key] for key in keys]


def _reason(contrast: Contrast) -> str:
    if contrast.difference is None:
        return "the two rows have no seed in common"
    count = len(contrast.difference.seeds)
    if count <= EXPLORATORY_SEEDS:
        return f"{counted(count, 'seed')}: a verdict needs {EXPLORATORY_SEEDS + 1} or more"
    if contrast.estimate is None:
        return f"all {count} seeds have the same difference, so they show no spread to judge chance by"
    return ""

"""Means, deviations and paired differences over seeds, with exact t intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Summary:
    """Values of one arm over its seeds."""

    count: int
    mean: float
    deviation: float | None  # of the sample (n - 1); None for a single value


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Arm minus reference, seed by seed."""

    seeds: tuple[int, ...]  # those that both have
    left_out: tuple[int, ...]  # those that only one has: no part of any number here
    differences: tuple[float, ...]
    mean: float
    deviation: float | None
    interval: tuple[float, float] | None  # 95 % t interval of the mean; None with one seed
    wins: int  # seeds in which the arm is strictly better


def summarize(values: Iterable[float]) -> Summary | None:
    """Count, mean and sample deviation; None for no values."""
    numbers = list(values)
    if not numbers:
        return None
    return Summary(len(numbers), statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], *, lower_is_better: bool = False
) -> PairedDifference | None:
    """The difference of two arms, paired by seed.

    Args:
        values, reference: one number a seed. Seeds that only one of them has are left out, and named in the result.
        lower_is_better: a win is then a negative difference; the differences themselves keep their sign.
    Returns:
        None where the two have no seed in common.
    """
    seeds = tuple(sorted(values.keys() & reference.keys()))
    if not seeds:
        return None
    differences = tuple(values[seed] - reference[seed] for seed in seeds)
    summary = summarize(differences)
    assert summary is not None
    interval = None
    if summary.deviation is not None:
        half = t_critical(summary.count - 1) * summary.deviation / math.sqrt(summary.count)
        interval = (summary.mean - half, summary.mean + half)
    return PairedDifference(
        seeds=seeds,
        left_out=tuple(sorted(values.keys() ^ reference.keys())),
        differences=differences,
        mean=summary.mean,
        deviation=summary.deviation,
        interval=interval,
        wins=sum(difference < 0 if lower_is_better else difference > 0 for difference in differences),
    )


@cache
def t_critical(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = `confidence`, for Student's distribution with `degrees` of freedom.

    Raises:
        ValueError: fewer than one degree of freedom, or a confidence outside (0, 1).
    Source: the finite series for whole degrees of freedom, Abramowitz and Stegun 1964, 26.7.3 and 26.7.4, inverted
    by bisection over the angle, which is bounded where t is not.
    """
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"a t interval needs at least one degree of freedom (two seeds) and a confidence between 0 and 1, got "
            f"{degrees} and {confidence}"
        )
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _central_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(high)


def _central_probability(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) * tan(angle))."""
    odd = degrees % 2
    cosine = math.cos(angle)
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total

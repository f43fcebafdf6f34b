"""Means, deviations and paired differences over seeds; exact t intervals and tests; Holm's correction."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95
_ROUNDING = 1e-12  # of the largest score: 0.20 - 0.16 and 0.12 - 0.08 are the same difference


@dataclass(frozen=True, slots=True)
class Summary:
    """Values of one arm over its seeds."""

    count: int
    mean: float
    deviation: float | None  # of the sample (n - 1); None for a single value
    median: float
    bimodal: bool  # whether the values fall into two groups, see `is_bimodal`


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean difference with its standard error: (mean - truth) / error follows Student's t."""

    mean: float
    error: float  # standard error of the mean, >= 0
    degrees: int  # of freedom, >= 1
    covers: str  # what another experiment would draw anew: `seeds`, `seeds and pictures`, or `folds`

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % t interval."""
        half = t_critical(self.degrees) * self.error
        return self.mean - half, self.mean + half

    def p_different(self) -> float:
        """Two-sided p of the hypothesis that the true difference is 0."""
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return 2 * t_tail(abs(self.mean) / self.error, self.degrees)

    def p_within(self, smallest: float) -> float:
        """p of the hypothesis that the true difference is at least `smallest` in size: small means equivalence.

        Source: the two one-sided tests of Schuirmann 1987, J. Pharmacokinetics and Biopharmaceutics 15, 657-680.
        """
        if self.error == 0:
            return 0.0 if abs(self.mean) < smallest else 1.0
        return t_tail((smallest - abs(self.mean)) / self.error, self.degrees)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Arm minus reference, seed by seed."""

    seeds: tuple[int, ...]  # those that both have
    left_out: tuple[int, ...]  # those that only one has: no part of any number here
    differences: tuple[float, ...]
    mean: float
    deviation: float | None  # of the sample; None with one seed, 0 where all differences are equal
    wins: int  # seeds in which the arm is strictly better

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t interval of the mean over seeds; None with one seed, or where all seeds differ equally."""
        return None if self.estimate is None else self.estimate.interval

    @property
    def spreadless(self) -> bool:
        """Whether several seeds have the same difference: chance then cannot be judged by them."""
        return self.deviation == 0

    @property
    def estimate(self) -> Estimate | None:
        """The mean with its standard error over seeds; None where `interval` is."""
        if not self.deviation:
            return None
        count = len(self.seeds)
        return Estimate(self.mean, self.deviation / math.sqrt(count), count - 1, "seeds")


def summarize(values: Iterable[float]) -> Summary | None:
    """Count, mean, sample deviation and median; None for no values."""
    numbers = list(values)
    if not numbers:
        return None
    return Summary(
        count=len(numbers),
        mean=statistics.fmean(numbers),
        deviation=statistics.stdev(numbers) if len(numbers) > 1 else None,
        median=statistics.median(numbers),
        bimodal=is_bimodal(numbers),
    )


def is_bimodal(values: Sequence[float]) -> bool:
    """Whether values fall into two groups, as scores do where some seeds stay on a plateau.

    The rule: at least three values, whose widest gap between neighbours is at least 2/3 of their range and at least a
    quarter of the largest size among them. The second condition keeps seeds that merely scatter out.
    """
    ordered = sorted(values)
    if len(ordered) < 3:
        return False
    widest = max(after - before for before, after in itertools.pairwise(ordered))
    return widest > 0 and widest >= 2 / 3 * (ordered[-1] - ordered[0]) and widest >= max(map(abs, ordered)) / 4


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
    deviation = summary.deviation
    largest = max(abs(each[seed]) for each in (values, reference) for seed in seeds)
    if deviation is not None and deviation <= _ROUNDING * largest:
        deviation = 0.0
    return PairedDifference(
        seeds=seeds,
        left_out=tuple(sorted(values.keys() ^ reference.keys())),
        differences=differences,
        mean=summary.mean,
        deviation=deviation,
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


def t_tail(t: float, degrees: int) -> float:
    """P(T >= t) for Student's distribution with `degrees` of freedom, at least 1."""
    central = _central_probability(math.atan(abs(t) / math.sqrt(degrees)), degrees)
    tail = max(0.0, (1 - central) / 2)
    return tail if t >= 0 else 1 - tail


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """The p values corrected for their number, in the given order: below alpha where Holm's procedure rejects.

    Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return tuple(adjusted)


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

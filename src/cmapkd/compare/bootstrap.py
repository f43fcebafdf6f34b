"""The chance of seeds and of pictures in one standard error: a bootstrap over both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmapkd.compare.statistics import Estimate

Floats = NDArray[np.floating[Any]]

RESAMPLES = 2000
MAX_GROUPS = 10_000
"""More pictures than this are first summed up in so many random groups, which are then resampled."""

_ROUNDING = 1e-12  # a standard error below this share of the largest value is none
_BLOCK = 4_000_000  # weights of pictures held at once


class Part(NamedTuple):
    """A mean over queries, by seed and picture; a metric is the mean of its parts (recall of both directions)."""

    sums: Floats  # [seeds, pictures]: arm minus reference, summed over the queries of each picture, such as captions
    queries: Floats  # [pictures]: how many queries each picture has


def two_way_estimate(parts: Sequence[Part], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate | None:
    """The mean paired difference with a standard error that covers other seeds and other pictures.

    Each resample draws seeds and, independently, pictures with replacement. A picture takes its captions with it, and a
    pair (seed, picture) its paired difference. This is the pigeonhole bootstrap of Owen 2007 (Annals of Applied
    Statistics 1, 386-411, doi:10.1214/07-AOAS122). Two things are corrected, because five seeds are few:

    - n - 1 of n seeds are drawn, so that the variance over seeds is s²/n and not s²(n - 1)/n².
    - With d = mean + seed + picture + rest, the pigeonhole variance holds the variance of the rest three times. The two
      surplus times are taken off, by the mean square of the rest in a two-way analysis of variance.

    The interval is mean ± t x error. The degrees of freedom are Satterthwaite's, rounded down: about those of the seeds
    where seeds dominate, and many where pictures do. The variance is at least that of the seeds alone, of the pictures
    alone, and of the rest alone. Each of them is a lower bound that the estimate can miss by chance.

    Covered: other random seeds, and other pictures with captions from where these came from. Not covered: other
    training data, another teacher, or pictures of another kind.

    Args:
        parts: of one metric, all with the same seeds and pictures.
        resamples: the error of the standard error is 1 / sqrt(2 x resamples), 1.6 % with 2,000.
        seed: of the random draws.
    Returns:
        None with fewer than two seeds or two pictures, or where every seed has the same difference at every picture.
    """
    num_seeds, num_pictures = parts[0].sums.shape
    if num_seeds < 2 or num_pictures < 2:
        return None
    random = np.random.default_rng(seed)
    if num_pictures > MAX_GROUPS:
        parts, num_pictures = _grouped(parts, random), MAX_GROUPS
    linear = _linearised(parts)
    mean = float(np.mean([part.sums.sum(1).mean() / part.queries.sum() for part in parts]))
    of_seeds = float(linear.mean(1).var(ddof=1)) / num_seeds
    rest = linear - linear.mean(0) - linear.mean(1, keepdims=True) + linear.mean()
    of_rest = float((rest**2).sum()) / ((num_seeds - 1) * (num_pictures - 1)) / (num_seeds * num_pictures)
    drawn = float(_resampled_means(parts, resamples, random).var(ddof=1))
    pictures_alone = float(linear.mean(0).var(ddof=1)) / num_pictures
    variance = max(drawn - 2 * of_rest, of_seeds, pictures_alone, of_rest)
    if variance <= (_ROUNDING * float(np.abs(linear).max())) ** 2:
        return None
    of_pictures = variance - of_seeds
    spread = of_seeds**2 / (num_seeds - 1) + of_pictures**2 / (num_pictures - 1)
    degrees = max(num_seeds - 1, math.floor(variance**2 / spread))
    return Estimate(mean, math.sqrt(variance), degrees, "seeds and pictures")


def _resampled_means(parts: Sequence[Part], resamples: int, random: np.random.Generator) -> Floats:
    """The metric's mean difference in each resample of seeds and pictures."""
    num_seeds, num_pictures = parts[0].sums.shape
    seeds = _weights(resamples, num_seeds, num_seeds - 1, random) / (num_seeds - 1)
    means = np.empty(resamples)
    size = max(1, _BLOCK // num_pictures)
    for first in range(0, resamples, size):
        block = slice(first, min(first + size, resamples))
        pictures = _weights(block.stop - first, num_pictures, num_pictures, random)
        of_parts = []
        for part in parts:
            queries = pictures @ part.queries
            sums = ((pictures @ part.sums.T) * seeds[block]).sum(1)
            of_parts.append(np.divide(sums, queries, out=np.zeros_like(sums), where=queries > 0))
        means[block] = np.mean(of_parts, axis=0)
    return means


def _weights(resamples: int, count: int, draws: int, random: np.random.Generator) -> Floats:
    """How often each of `count` things is drawn in each resample: [resamples, count]."""
    drawn = random.integers(count, size=(resamples, draws)) + count * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count).astype(float)


def _linearised(parts: Sequence[Part]) -> Floats:
    """Each seed's and picture's part in the metric, [seeds, pictures]: their mean is the metric's difference.

    A ratio of sums has the first-order deviations (sum - ratio x queries) / mean of queries.
    """
    of_parts = []
    for part in parts:
        ratio = part.sums.sum(1, keepdims=True) / part.queries.sum()
        of_parts.append(ratio + (part.sums - ratio * part.queries) / part.queries.mean())
    return np.asarray(np.mean(of_parts, axis=0))


def _grouped(parts: Sequence[Part], random: np.random.Generator) -> list[Part]:
    """Sums over random groups of pictures: their variance per picture is expected to be that of the pictures."""
    num_pictures = len(parts[0].queries)
    group = random.permutation(num_pictures) % MAX_GROUPS

    def sums(values: Floats) -> Floats:
        return np.bincount(group, weights=values, minlength=MAX_GROUPS).astype(float)

    return [Part(np.stack([sums(row) for row in part.sums]), sums(part.queries)) for part in parts]

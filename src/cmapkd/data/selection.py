"""Which samples to label next: far from all that are labelled, or as many of each class. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.data.random import key_of

_AT_ONCE = 4_096  # points whose distances are held together


def greedy_k_centre(
    points: Float[Tensor, "points dim"], start: Float[Tensor, "start dim"], number: int
) -> Int[Tensor, " number"]:
    """Points one after the other, each the farthest from all that were taken and from `start`; Euclidean.

    Args:
        start: what is there already; with none the first point is the one nearest to the mean.
        number: how many are taken, from 0 to all.
    Returns:
        Rows of `points`, in the order in which they were taken; of equally far ones the first.
    Raises:
        ValueError: the widths differ, or there are too few points.
    Source: core sets, Sener & Savarese 2018, arXiv:1708.00489; of probabilities PCoreSet, arXiv:2506.00910.
    """
    if points.ndim != 2 or start.ndim != 2 or points.shape[1] != start.shape[1]:
        raise ValueError(f"points have shape {tuple(points.shape)} and the start {tuple(start.shape)}: one width")
    if not 0 <= number <= len(points):
        raise ValueError(f"{number} of {len(points)} points are to be taken")
    taken: list[int] = []
    if len(start):
        parts = start.split(_AT_ONCE)
        nearest = torch.stack([torch.cdist(points, part).amin(1) for part in parts]).amin(0)
    else:
        nearest = -(points - points.mean(0)).norm(dim=1)
    while len(taken) < number:
        place = int(nearest.argmax())
        distance = (points - points[place]).norm(dim=1)
        nearest = torch.minimum(nearest, distance) if taken or len(start) else distance
        taken.append(place)
        nearest[taken] = -torch.inf  # also of points that lie in one place none is taken twice
    return torch.tensor(taken, dtype=torch.long)


def covering_radius(points: Float[Tensor, "points dim"], centres: Float[Tensor, "centres dim"]) -> float:
    """The largest distance of a point from its nearest centre, >= 0."""
    return max(float(torch.cdist(part, centres).amin(1).max()) for part in points.split(_AT_ONCE))


def balanced(classes: Sequence[int], ids: Sequence[str], number: int, *, draw: int = 0) -> list[int]:
    """As many of each class as can be, and of a class those that `draw` chooses by their ids.

    Args:
        classes: of each sample; negative ones are left out.
        ids: of each sample.
    Returns:
        Places of the samples, ascending. Where a class has too few, the others give more. What does not divide goes to
        the first classes.
    Raises:
        ValueError: fewer samples have a class than are asked for.
    """
    waiting: dict[int, list[int]] = {}
    for place, label in enumerate(classes):
        if label >= 0:
            waiting.setdefault(label, []).append(place)
    if sum(map(len, waiting.values())) < number:
        raise ValueError(f"{number} samples are asked for, and {sum(map(len, waiting.values()))} have a class")
    order = {label: sorted(places, key=lambda place: key_of("balance", draw, ids[place]))
             for label, places in sorted(waiting.items())}  # fmt: skip
    taken: list[int] = []
    turn = 0
    while len(taken) < number:
        taken += [places[turn] for places in order.values() if turn < len(places)][: number - len(taken)]
        turn += 1
    return sorted(taken)

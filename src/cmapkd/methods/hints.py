"""Hints: the student's inner levels against the teacher's same levels, for a method that compares embeddings else.

FitNets' idea (Romero et al., ICLR 2015, arXiv:1412.6550) at several levels of both towers; the levels and their
distance are CMAPKD's, so that a baseline can be given what CMAPKD has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import closest
from cmapkd.data.types import Batch
from cmapkd.features import LANGUAGE_LEVELS, VISUAL_LEVELS, LevelMatcher, Role
from cmapkd.models import DualEncoder, Features, LevelRequest
from cmapkd.objectives import level_distance

HINT_LEVELS = tuple(level for level in (*VISUAL_LEVELS, *LANGUAGE_LEVELS) if level not in ("P5", "L4"))
"""The inner levels; P5 and L4 are embeddings, which have terms of their own."""


class Hints(nn.Module):
    """One linear map and one distance for each inner level; every place of a level is compared.

    Args:
        weights: what each level counts, by name (`HINT_LEVELS`); a level at 0 is not read.
    """

    def __init__(self, weights: Mapping[str, float], student: DualEncoder, teacher: DualEncoder) -> None:
        super().__init__()
        self.weights = {level: weights[level] for level in HINT_LEVELS if weights.get(level)}
        self.match = LevelMatcher(student, teacher, levels=tuple(self.weights))

    def needs(self, role: Role) -> LevelRequest:
        """Levels that a model must expose."""
        return self.match.needs(role, tuple(self.weights))

    @property
    def reads_places(self) -> bool:
        """Whether more than one vector a level is compared; L3 is the sentence's one."""
        return self.weights.keys() != {"L3"}

    def distances(self, part: Batch, student: Features, teacher: Features) -> dict[str, Float[Tensor, " batch"]]:
        """How far each sample's levels are from the teacher's, by level; of this process's samples."""
        levels = tuple(self.weights)
        matched = self.match.match_visual(student, teacher, levels) if {*levels} & {*VISUAL_LEVELS} else {}
        if {*levels} & {*LANGUAGE_LEVELS}:
            matched |= self.match.match_language(part, student, teacher, levels)
        return {name: level_distance(it.student, it.teacher, it.mask) for name, it in matched.items()}

    def loss(self, distances: Mapping[str, Float[Tensor, " batch"]]) -> Float[Tensor, ""]:
        """Sum over the levels of weight times batch mean."""
        return torch.stack([self.weights[level] * values.mean() for level, values in distances.items()]).sum()


def checked_hints(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights, once their levels are known and none is negative.

    Raises:
        ValueError: an unknown level, or a negative weight.
    """
    for level, weight in weights.items():
        if level not in HINT_LEVELS:
            raise ValueError(f"unknown level {level!r}{closest(level, HINT_LEVELS)}; known: {', '.join(HINT_LEVELS)}")
        if weight < 0:
            raise ValueError(f"{level} is {weight:g}, weights are not negative")
    return dict(weights)

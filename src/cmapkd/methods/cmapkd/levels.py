"""The eight levels of CMAPKD, and what the terms keep of each level for each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from jaxtyping import Float
from torch import Tensor

from cmapkd.features import LANGUAGE_LEVELS, VISUAL_LEVELS, Role
from cmapkd.objectives import prior_coupling

LEVELS = (*VISUAL_LEVELS, *LANGUAGE_LEVELS)
INTRA = {"visual": VISUAL_LEVELS, "language": LANGUAGE_LEVELS}
"""The terms within a modality, and their levels."""
INNER = tuple(level for level in LEVELS if level not in ("P5", "L4"))
"""Levels that are no embedding of the joint space."""
JOINT = "P5-L4"
"""The pair that meets in the models' own joint space: it needs no bridge, and has a term of its own, `relational`."""
PAIRS = tuple(pair for pair in map("-".join, product(VISUAL_LEVELS, LANGUAGE_LEVELS)) if pair != JOINT)
"""Pairs of a visual and a language level that bridges can bring together."""


@dataclass(frozen=True, slots=True)
class LevelRows:
    """What the terms keep of the levels, by level: one row for each sample, none of which depends on another sample.

    Attributes:
        distance: how far the student's level is from the teacher's.
        student: the student's level as one vector, in its own width.
        teacher: the teacher's level as one vector, in its own width.
    """

    distance: Mapping[str, Float[Tensor, " batch"]] = field(default_factory=dict)
    student: Mapping[str, Float[Tensor, "batch student_width"]] = field(default_factory=dict)
    teacher: Mapping[str, Float[Tensor, "batch teacher_width"]] = field(default_factory=dict)

    def vectors(self, role: Role, levels: Sequence[str]) -> dict[str, Float[Tensor, "batch width"]]:
        """One model's vectors of some levels, in the order of `levels`."""
        rows = self.student if role == "student" else self.teacher
        return {level: rows[level] for level in levels}


def prior_by_pair() -> dict[str, float]:
    """`prior_coupling` by the names of the pairs, without those that are not coupled and without the joint space's."""
    pairs = map("-".join, product(VISUAL_LEVELS, LANGUAGE_LEVELS))
    prior = dict(zip(pairs, prior_coupling().flatten().tolist(), strict=True))
    return {pair: prior[pair] for pair in PAIRS if prior[pair]}


def levels_of(pairs: Sequence[str]) -> list[str]:
    """The levels of pairs, each once, fine to coarse."""
    return [level for level in LEVELS if any(level in pair.split("-") for pair in pairs)]

"""Which levels the terms of a stage read, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cmapkd.data.types import Batch
from cmapkd.features import LevelMatcher, with_means
from cmapkd.methods.cmapkd.config import CMAPKDConfig
from cmapkd.methods.cmapkd.levels import INTRA, LevelRows
from cmapkd.methods.dual import TeacherDetail
from cmapkd.methods.stages import StageConfig
from cmapkd.models import Features
from cmapkd.objectives import level_distance
from cmapkd.weighting import WEIGHTINGS

POOLING = ("bank_level", "bank_pair", "pyramid", "alignment", "bridge", "relation", "layer_relation")
"""Terms that read each level as one vector."""


@dataclass(frozen=True, slots=True)
class LevelPlan:
    """What the terms of one stage read of the levels."""

    config: CMAPKDConfig
    stage: StageConfig

    def wants(self, term: str) -> bool:
        """Whether the stage computes a term."""
        return term in self.config.term_weights() and self.stage.wants_term(term)

    def of_stage(self) -> list[str]:
        """The method's levels that the stage has."""
        return [level for level in self.config.level_names() if self.stage.wants_level(level)]

    def compared(self, term: str) -> list[str]:
        """Levels that a term within a modality compares with the teacher's, fine to coarse."""
        if not self.wants(term):
            return []
        return [level for level in self.config.weighed_items()[term] if self.stage.wants_level(level)]

    def pools(self) -> bool:
        """Whether some term reads each level as one vector."""
        return any(map(self.wants, POOLING))

    def attends(self) -> bool:
        """Whether the selection looks at the teacher's levels, each as one vector."""
        reads_levels = WEIGHTINGS[self.config.weighting.name].reads_levels
        return reads_levels and any(map(self.wants, self.config.weighed_items()))

    def read(self) -> set[str]:
        """Levels that some term reads."""
        pooled = {*self.of_stage()} if self.pools() else set[str]()
        return pooled.union(*map(self.compared, INTRA))

    def detail(self, *, has_inner_levels: bool) -> TeacherDetail:
        """How finely the teacher is read: only distances place by place need more than one vector a level; L3 is one.

        Args:
            has_inner_levels: whether the teacher must expose levels besides its embeddings.
        """
        places = {level for term in INTRA if self.wants(term) for level in self.config.weighed_items()[term]}
        if places - {"P5", "L4", "L3"}:
            return self.config.places
        return "pooled" if has_inner_levels else "global"


def read_levels(match: LevelMatcher, plan: LevelPlan, batch: Batch, student: Features, teacher: Features) -> LevelRows:
    """The rows of a part of the batch, of this process's samples alone.

    Args:
        batch: the part, for its texts.
        student, teacher: both models' features of it, with the levels that the plan reads.
    """
    if plan.pools() and plan.config.ablations.depths == "last":  # a mean over blocks is cheaper to pool after it
        student, teacher = with_means(student), with_means(teacher)
    distance: dict[str, Tensor] = {}
    visual, language = plan.compared("visual"), plan.compared("language")
    if visual:
        matched = match.match_visual(student, teacher, visual)
        distance |= {name: level_distance(level.student, level.teacher, level.mask) for name, level in matched.items()}
    if language:
        matched = match.match_language(batch, student, teacher, language)
        distance |= {name: level_distance(level.student, level.teacher, level.mask) for name, level in matched.items()}
    levels = plan.of_stage()
    of_student = match.pooled("student", student, levels) if plan.pools() else {}
    of_teacher = {}
    if plan.pools() or plan.attends():
        read = plan.read() | {"P5", "L4"}
        of_teacher = match.pooled("teacher", teacher, [level for level in levels if level in read])
    return LevelRows(distance, of_student, of_teacher)

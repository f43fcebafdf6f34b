"""TinyCLIP's affinity mimicking (Wu et al., ICCV 2023, arXiv:2309.12314).

Its other half, a student that begins with slices of its teacher's weights, is a setting of the student and so there for
every method: `student: {name: ..., inherit: teacher}`, see docs/methods/tinyclip.md.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from cmapkd.data.types import Batch
from cmapkd.methods.base import MethodCard, MethodConfig, Term, task_loss
from cmapkd.methods.pruning import PruningConfig, PruningMethod
from cmapkd.models import MAX_LOGIT_SCALE, DualEncoder, FrozenTeacher
from cmapkd.objectives import similarity_divergence


class TinyCLIPConfig(PruningConfig):
    """How much the affinities count, and how sharp they are."""

    alpha: float = Field(
        1.0, ge=0, le=1, description="Weight of the affinities; the student's own contrastive loss has the rest."
    )
    logit_scale: float | None = Field(
        50.0, gt=0, le=MAX_LOGIT_SCALE, description="Of both models, fixed; none: the teacher's own and a learned one."
    )


class TinyCLIP(PruningMethod):
    """The student imitates which texts and images of the batch the teacher finds alike, in both directions."""

    Config: ClassVar[type[MethodConfig]] = TinyCLIPConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="TinyCLIP: affinity mimicking, with weights inherited from the teacher",
        paper="Wu et al., ICCV 2023, arXiv:2309.12314",
        equations=(
            "A_S = s v_S t_Sᵀ, A_T = s v_T t_Tᵀ, s = 50 in both",
            "L_aff = 1/2 [KL(σ(A_T) ‖ σ(A_S)) + KL(σ(A_Tᵀ) ‖ σ(A_Sᵀ))]",
            "L = α L_aff + (1 - α) L_contrastive, α = 1",
        ),
        needs="embeddings of both models, and their logit scales where none is given; widths may differ",
        trainable="the student; its logit scale only with logit_scale: null",
        departures=(
            "KL in place of the soft cross-entropy: the same gradient, and zero at agreement.",
            "The student's logit scale is the given one from the first step on; in the published code from the second.",
            "Weight inheritance is the student's setting inherit, for any method.",
            "Automatic inheritance with learned masks is not in this version.",
        ),
        checked_against="ClipSoftLoss and weight_inherit of the published code, run on random tensors: values and "
        "gradients, and every slice, tests/methods/fixtures/tinyclip.json",
    )

    def __init__(self, config: TinyCLIPConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        self._fix_scale()

    @property
    def term_names(self) -> tuple[str, ...]:
        weights = {"affinity": self.config.alpha, "contrastive": 1 - self.config.alpha}
        return tuple(name for name, weight in weights.items() if weight)

    def terms(self, batch: Batch) -> dict[str, Term]:
        config, student = self.config, self.encode_student(batch)
        terms: dict[str, Term] = {}
        if self.wants("affinity", config.alpha):
            teacher = self.encode_teacher(batch)
            affinity = similarity_divergence(
                student.image.embedding,
                student.text.embedding,
                teacher.image.embedding,
                teacher.text.embedding,
                student_scale=student.logit_scale,
                teacher_scale=teacher.logit_scale if config.logit_scale is None else config.logit_scale,
            )
            terms["affinity"] = Term(affinity, config.alpha)
        if self.wants("contrastive", 1 - config.alpha):
            terms["contrastive"] = Term(task_loss(student), 1 - config.alpha)
        return terms

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        self._fix_scale()

    @torch.no_grad()
    def _fix_scale(self) -> None:
        if self.config.logit_scale is not None:
            self.student.log_logit_scale.fill_(math.log(self.config.logit_scale))

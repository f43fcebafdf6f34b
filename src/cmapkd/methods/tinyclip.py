"""TinyCLIP's affinity mimicking and automatic weight inheritance (Wu et al., ICCV 2023, arXiv:2309.12314).

Its manual inheritance, a student that begins with slices of its teacher's weights, is a setting of the student and so
there for every method: `student: {name: ..., inherit: teacher}`, see docs/methods/tinyclip.md.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import task_loss
from cmapkd.methods.in_batch import similarity_loss
from cmapkd.methods.pruning import PruningConfig, PruningMethod
from cmapkd.methods.step import StepInfo
from cmapkd.methods.terms import Term
from cmapkd.models import MAX_LOGIT_SCALE, DualEncoder, FrozenTeacher


class TinyCLIPConfig(PruningConfig):
    """How much the affinities count, how sharp they are, and whether the student becomes smaller."""

    alpha: float = Field(
        1.0, ge=0, le=1, description="Weight of the affinities; the student's own contrastive loss has the rest."
    )
    logit_scale: float | None = Field(
        50.0, gt=0, le=MAX_LOGIT_SCALE, description="Of both models, fixed; none: the teacher's own and a learned one."
    )


class TinyCLIP(PruningMethod):
    """The student imitates which texts and images of the batch the teacher finds similar, in both directions."""

    Config: ClassVar[type[MethodConfig]] = TinyCLIPConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="TinyCLIP: affinity mimicking, with weights inherited from the teacher",
        paper="Wu et al., ICCV 2023, arXiv:2309.12314",
        equations=(
            "A_S = s v_S t_Sᵀ, A_T = s v_T t_Tᵀ, s = 50 in both",
            "L_aff = 1/2 [KL(σ(A_T) ‖ σ(A_S)) + KL(σ(A_Tᵀ) ‖ σ(A_Sᵀ))]",
            "L = α L_aff + (1 - α) L_contrastive, α = 1; in a stage with masks + λ1 g + λ2 g², g = max(s* - ŝ, 0), "
            "where λ1 and λ2 ascend",
            "gate of a unit: clip(1.2 σ((log u - log(1 - u) + log a) / β) - 0.1, 0, 1), β = 2/3, u uniform",
            "P = σ(log a - β log(1/11)), ŝ = 1 - Σ_towers ΣP_channel (4 d ΣP_head + 2 ΣP_unit) / N",
            "at the end: σ(0.8 log a / β), the round(Σ(1 - P)) smallest of a group 0; the others go into the weights",
        ),
        needs="embeddings of both models, and their logit scales where none is given; widths may differ",
        trainable="the student; its logit scale only with logit_scale: null; one log a for each channel of a tower and "
        "each head and hidden unit of a layer, and two multipliers (none of them in the student that is saved)",
        departures=(
            "KL in place of the soft cross-entropy: the same gradient, and zero at agreement.",
            "The student's logit scale is the given one from the first step on; in the published code from the second.",
            "Manual inheritance is the student's setting inherit, for any method; automatic inheritance is "
            "masks.sparsity, or a stage's sparsity.",
            "Sparsity counts entries of the layers' matrices; the published code also biases, more of them in N than "
            "in what is left.",
            "One pair of multipliers for both towers; the published code averages two pairs that are always equal. "
            "They ascend because their gradient has the other sign, not by a negative rate.",
            "Later stages mask what is left. The published code fills it up with zeros to the first size, where what "
            "was taken out could come back.",
            "At least one channel of each tower, and one head and one unit of each layer, stay.",
            "Gates are drawn once a step for all processes, and the projection behind the last norm is not multiplied "
            "by the channels' gates: the published fusion does that, its forward pass does not.",
            "Masks of later stages begin as the first ones do, at log a = log 100; the published first value, 10, is "
            "that after one step.",
            "In stages with masks the student's rate follows the run's schedule; masks and multipliers have rate 0.02 "
            "throughout, as published, but no momentum: it would carry them about ten steps past the target, where the "
            "hinge does not call them back.",
        ),
        checked_against="ClipSoftLoss and weight_inherit of the published code, run on random tensors: values and "
        "gradients, and every slice, tests/methods/fixtures/tinyclip.json. L0Module (probabilities, draws, fixed "
        "gates, expected size, constraint of one tower and of both, target), values and gradients: "
        "tinyclip_masks.json. The forward pass with masks: written out",
    )

    def __init__(self, config: TinyCLIPConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        self.weights = {"affinity": config.alpha, "contrastive": 1 - config.alpha}
        self._fix_scale()

    def terms(self, batch: Batch) -> dict[str, Term]:
        student = self.encode_student(batch)
        values: dict[str, Tensor] = {}
        if self.wants("affinity"):
            teacher, scale = self.encode_teacher(batch), self.config.logit_scale
            values["affinity"] = similarity_loss(student, teacher, teacher_scale=scale)
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        return self.weighted(values)

    @torch.no_grad()
    def after_step(self, step: StepInfo | None = None) -> None:
        super().after_step(step)
        self._fix_scale()

    @torch.no_grad()
    def _fix_scale(self) -> None:
        if self.config.logit_scale is not None:
            self.student.log_logit_scale.fill_(math.log(self.config.logit_scale))

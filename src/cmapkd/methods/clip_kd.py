"""CLIP-KD for dual encoders (Yang et al., CVPR 2024, arXiv:2307.12732): feature, relational and interactive terms.

Departures and how they were checked: the card below and docs/methods/clip_kd.md.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cmapkd.data.types import Batch
from cmapkd.features import PairProjector
from cmapkd.methods.base import Method, MethodCard, MethodConfig, Term, task_loss
from cmapkd.models import MAX_LOGIT_SCALE, DualEncoder, FrozenTeacher
from cmapkd.objectives import feature_distance, interactive_loss, similarity_divergence

PUBLISHED_FEATURE_WEIGHT = 2000 / 512  # 2000 × the mean over 512 channels, restated for the sum over channels


class ClipKDConfig(MethodConfig):
    """The weight of each term; a weight of zero switches its computation off."""

    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")
    feature_weight: float = Field(
        PUBLISHED_FEATURE_WEIGHT,
        ge=0,
        description="Weight of the squared distance between unit embeddings, summed over both modalities.",
    )
    relational_weight: float = Field(1.0, ge=0, description="Weight of the KL between in-batch similarities.")
    interactive_weight: float = Field(1.0, ge=0, description="Weight of InfoNCE against the teacher's other modality.")
    interactive_scale: Literal["exp", "official"] = Field(
        "exp",
        description="exp: the learned scale is exponentiated and clamped as CLIP's; official: used raw, as in the "
        "published code (it starts at 2.66 instead of 14.3).",
    )


class ClipKD(Method):
    """The student imitates the teacher's embeddings and similarities, and is contrasted with its other modality."""

    Config: ClassVar[type[MethodConfig]] = ClipKDConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="CLIP-KD: feature, relational and interactive distillation of dual encoders",
        paper="Yang et al., CVPR 2024, arXiv:2307.12732",
        equations=(
            "v̂ = N(W_v v_S), t̂ = N(W_t t_S) (linear maps only where the widths differ)",
            "L_FD = |v̂ - v_T|² + |t̂ - t_T|², batch mean",
            "L_CRD = 1/2 [KL(σ(s_T v_T t_Tᵀ) ‖ σ(s_S v_S t_Sᵀ)) + the transposed]",
            "L_ICL = 1/2 [CE(c v̂ t_Tᵀ, diag) + CE(c t̂ v_Tᵀ, diag)]",
            "L = L_contrastive + 3.9 L_FD + L_CRD + L_ICL",
        ),
        needs="embeddings and logit scales of both models",
        trainable="the student, W_v and W_t where the widths differ, the interactive logit scale c",
        departures=(
            "L_FD is a sum over channels, so its weight keeps its meaning at any width: 2000 × mean at width 512 is "
            "3.9 × this sum.",
            "c is exponentiated and clamped to [1, 100] like CLIP's scale; interactive_scale: official restores the "
            "published code, which uses the logarithm itself.",
            "Masked-feature, gradient and augmented-feature terms are not in this version.",
        ),
        checked_against="the published loss class run on random embeddings: values and gradients, "
        "tests/methods/fixtures/clip_kd.json",
    )

    def __init__(self, config: ClipKDConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config = config
        projected = config.feature_weight > 0 or config.interactive_weight > 0
        self.project = PairProjector(student.embed_dim, teacher.embed_dim) if projected else None
        self.interactive_scale = (
            nn.Parameter(torch.tensor(math.log(1 / 0.07))) if config.interactive_weight > 0 else None
        )

    @property
    def term_names(self) -> tuple[str, ...]:
        config = self.config
        weights = {
            "contrastive": config.task_weight,
            "relational": config.relational_weight,
            "feature": config.feature_weight,
            "interactive": config.interactive_weight,
        }
        return tuple(name for name, weight in weights.items() if weight)

    def terms(self, batch: Batch) -> dict[str, Term]:
        config, student, teacher = self.config, self.encode_student(batch), self.encode_teacher(batch)
        teacher_pair = (teacher.image.embedding, teacher.text.embedding)
        terms: dict[str, Term] = {}
        if self.wants("contrastive", config.task_weight):
            terms["contrastive"] = Term(task_loss(student), config.task_weight)
        if self.wants("relational", config.relational_weight):
            relational = similarity_divergence(
                student.image.embedding,
                student.text.embedding,
                *teacher_pair,
                student_scale=student.logit_scale,
                teacher_scale=teacher.logit_scale,
            )
            terms["relational"] = Term(relational, config.relational_weight)
        if self.project is not None:
            projected = self.project(student)
            image, text = projected.image.embedding, projected.text.embedding
            if self.wants("feature", config.feature_weight):
                feature = feature_distance(image, teacher_pair[0]) + feature_distance(text, teacher_pair[1])
                terms["feature"] = Term(feature, config.feature_weight)
            if self.wants("interactive", config.interactive_weight):
                interactive = interactive_loss(image, text, *teacher_pair, logit_scale=self._scale())
                terms["interactive"] = Term(interactive, config.interactive_weight)
        return terms

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        if self.interactive_scale is not None and self.config.interactive_scale == "exp":
            self.interactive_scale.clamp_(0.0, math.log(MAX_LOGIT_SCALE))

    def _scale(self) -> Tensor:
        assert self.interactive_scale is not None
        return self.interactive_scale if self.config.interactive_scale == "official" else self.interactive_scale.exp()

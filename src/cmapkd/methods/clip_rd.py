"""CLIP-RD for dual encoders (Chung et al. 2026, arXiv:2603.25383): CLIP-KD's terms, and relations between the models.

Departures and how they were checked: the card below and docs/methods/clip_rd.md.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import task_loss
from cmapkd.methods.in_batch import EmbeddingTerms, embeddings_of, pair_distance, similarity_loss
from cmapkd.methods.lent import LentConfig, LentMethod
from cmapkd.methods.own_scales import ScaleForm, factor, keep_in_range, new_scale
from cmapkd.methods.step import StepInfo
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher
from cmapkd.objectives import (
    contrastive_loss,
    crosswise_divergence,
    interactive_loss,
    vertical_divergence,
)


class ClipRDConfig(LentConfig, EmbeddingTerms):
    """The weight of each term; a weight of zero switches its computation off. By default the published combination."""

    hrd_weight: float = Field(
        1.0, ge=0, description="Weight of the KL between both models' in-batch similarities (horizontal)."
    )
    vrd_weight: float = Field(
        1.0, ge=0, description="Weight of the KL from the texts' similarities between the models to the images'."
    )
    vrd_contrastive_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of InfoNCE between the models within each modality. Published: always vrd_weight. Without "
        "this term the scale of the texts' similarities does not learn.",
    )
    xrd_weight: float = Field(
        1.0, ge=0, description="Weight of the KL, both ways, between similarities that cross models and modalities."
    )
    scale: ScaleForm = Field(
        "exp",
        description="exp: the three learned scales are exponentiated and clamped as CLIP's; official: used raw, as in "
        "the published code (they start at 2.66 instead of 14.3).",
    )
    task_space: Literal["own", "official"] = Field(
        "own",
        description="Where the widths differ, own: the contrastive and hrd terms compare the student's own embeddings, "
        "which retrieval uses; official: the projected ones, as in the published code.",
    )


class ClipRD(LentMethod):
    """The student's relations to the teacher become alike in both modalities, besides what CLIP-KD distils."""

    Config: ClassVar[type[MethodConfig]] = ClipRDConfig
    steady = True
    contrasts = ("contrastive", "interactive", "vrd_contrastive")
    card: ClassVar[MethodCard] = MethodCard(
        title="CLIP-RD: horizontal, vertical and cross relational distillation of dual encoders",
        paper="Chung et al., 2026, arXiv:2603.25383",
        equations=(
            "v̂ = N(W_v v_S), t̂ = N(W_t t_S) (linear maps only where the widths differ); σ is the softmax over rows, "
            "the first argument of each KL gets no gradient",
            "L_FD = |v̂ - v_T|² + |t̂ - t_T|², batch mean",
            "L_ICL = 1/2 [CE(c v̂ t_Tᵀ, diag) + CE(c t̂ v_Tᵀ, diag)]",
            "L_HRD = 1/2 [KL(σ(s_T v_T t_Tᵀ) ‖ σ(s_S v_S t_Sᵀ)) + the transposed]",
            "L_VRD = 1/2 [KL(σ(b t_T t̂ᵀ) ‖ σ(a v_T v̂ᵀ)) + KL(σ(b t̂ t_Tᵀ) ‖ σ(a v̂ v_Tᵀ))]",
            "L_VRD,CE = 1/2 [CE(a v̂ v_Tᵀ, diag) + the transposed] + 1/2 [CE(b t̂ t_Tᵀ, diag) + the transposed]",
            "L_XRD = 1/4 [KL(σ(X) ‖ σ(Y)) + KL(σ(Y) ‖ σ(X)) + KL(σ(Xᵀ) ‖ σ(Yᵀ)) + KL(σ(Yᵀ) ‖ σ(Xᵀ))], "
            "X = c v_T t̂ᵀ, Y = c t_T v̂ᵀ",
            "L = L_contrastive + 3.9 L_FD + L_ICL + L_HRD + L_VRD + L_VRD,CE + L_XRD",
        ),
        needs="embeddings and logit scales of both models",
        trainable="the student, W_v and W_t where the widths differ, the logit scales a, b and c",
        departures=(
            "L_VRD,CE is in the published code, under the weight of L_VRD, and in neither the abstract nor the README. "
            "It has a weight of its own here, by default the published one.",
            "L_FD is a sum over channels, so its weight keeps its meaning at any width: 2000 × mean at width 512 is "
            "3.9 × this sum.",
            "a, b and c are exponentiated and clamped to [1, 100] like CLIP's scale; scale: official restores the "
            "published code, which uses the logarithms themselves.",
            "Where widths differ, L_contrastive and L_HRD read the student's own embeddings; task_space: official "
            "reads the projected ones, as the published code does.",
            "hints, bank_weight and projector: shared are no part of CLIP-RD and are off. They are cmapkd's, so that a "
            "comparison can give CLIP-RD each of them.",
        ),
        checked_against="the published loss class run on random embeddings: values and gradients of every term, "
        "tests/methods/fixtures/clip_rd.json",
    )

    config: ClipRDConfig

    def __init__(self, config: ClipRDConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config = config
        self.weights = {
            "contrastive": config.task_weight,
            "feature": config.feature_weight,
            "interactive": config.interactive_weight,
            "hrd": config.hrd_weight,
            "vrd": config.vrd_weight,
            "vrd_contrastive": config.vrd_contrastive_weight,
            "xrd": config.xrd_weight,
            "bank": config.bank_weight,
            "hints": float(any(config.hints.values())),
        }
        terms = {*self.term_names}
        alone = {"hints", *({"contrastive", "hrd"} if config.task_space == "own" else ())}
        self.project = self.make_projector(student, teacher) if terms - alone else None
        self.bank = self.make_bank(teacher)
        vertical = terms & {"vrd", "vrd_contrastive"}
        self.image_scale = new_scale() if vertical else None
        self.text_scale = new_scale() if vertical else None
        self.cross_scale = new_scale() if terms & {"interactive", "xrd"} else None
        # last, so that the other parts begin with the same draws with hints and without
        self.hints = self.make_hints(student, teacher)

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The terms of the stage; embeddings and hints' distances are of all processes' samples."""
        student, teacher, hints = self.encode_with_hints(batch)
        values = {} if hints is None else {"hints": hints}
        projected = self.project(student) if self.project is not None else student
        compared = projected if self.config.task_space == "official" else student
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(compared)
        if self.wants("hrd"):
            values["hrd"] = similarity_loss(compared, teacher)
        values |= self._between(projected, teacher)
        if self.bank is not None and self.wants("bank"):
            of_both = embeddings_of(projected), embeddings_of(teacher)
            values["bank"] = self.against_bank(self.bank, batch, *of_both, teacher.logit_scale)
        return self.weighted(values)

    def _between(self, student: Features, teacher: Features) -> dict[str, Tensor]:
        """The terms that compare student and teacher with each other, at the teacher's width."""
        (image, text), (teacher_image, teacher_text) = embeddings_of(student), embeddings_of(teacher)
        all_four = image, text, teacher_image, teacher_text
        values: dict[str, Tensor] = {}
        if self.wants("feature"):
            values["feature"] = pair_distance((image, text), (teacher_image, teacher_text))
        if self.cross_scale is not None:
            scale = factor(self.cross_scale, self.config.scale)
            if self.wants("interactive"):
                values["interactive"] = interactive_loss(*all_four, logit_scale=scale, pictures=student.pictures)
            if self.wants("xrd"):
                values["xrd"] = crosswise_divergence(*all_four, logit_scale=scale)
        if self.image_scale is not None and self.text_scale is not None:
            of_image, of_text = (factor(scale, self.config.scale) for scale in (self.image_scale, self.text_scale))
            if self.wants("vrd"):
                values["vrd"] = vertical_divergence(*all_four, image_scale=of_image, text_scale=of_text)
            if self.wants("vrd_contrastive"):
                values["vrd_contrastive"] = contrastive_loss(
                    image, teacher_image.detach(), logit_scale=of_image, pictures=student.pictures
                ) + contrastive_loss(text, teacher_text.detach(), logit_scale=of_text, pictures=student.pictures)
        return values

    @torch.no_grad()
    def after_step(self, step: StepInfo | None = None) -> None:
        super().after_step(step)
        keep_in_range((self.image_scale, self.text_scale, self.cross_scale), self.config.scale)

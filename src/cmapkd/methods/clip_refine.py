"""CLIP-Refine (Yamaguchi et al., CVPR 2025, arXiv:2504.12717): a short post-training that closes the modality gap.

Its teacher is the student as it begins: `teacher: student`. Departures: the card below and docs/methods/clip_refine.md.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod, task_loss
from cmapkd.methods.in_batch import embeddings_of
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher
from cmapkd.objectives import hybrid_divergence, reference_distance


class ClipRefineConfig(MethodConfig):
    """What each term counts, and what the in-batch softmaxes are of. By default the published weights."""

    reference_weight: float = Field(
        1.0, ge=0, description="Weight of the mean squared distance of both embeddings to random vectors (RaFA)."
    )
    distill_weight: float = Field(
        1.0, ge=0, description="Weight of the KL from the mixture of pairs and teacher, both ways (HyCD)."
    )
    task_weight: float = Field(0.0, ge=0, description="Weight of the student's own contrastive loss; published: none.")
    hard_share: float = Field(
        0.5, ge=0, lt=1, description="The own pair's part of the mixture; the rest is the teacher's softmax."
    )
    similarity: Literal["scaled", "raw"] = Field(
        "scaled",
        description="scaled: softmaxes of cosines times each model's logit scale; raw: of inner products of embeddings "
        "as they are, as published (which counts on norms near 10, those of OpenAI's models).",
    )
    references: Literal["shared", "own", "zero"] = Field(
        "shared",
        description="shared: an image and its text are drawn to the same random vector; controls are own, each to "
        "another, and zero, both to the origin. All three have the same gradient in expectation.",
    )


class ClipRefine(DualEncoderMethod):
    """Both modalities are drawn to shared random vectors, while soft targets keep what the model knows."""

    Config: ClassVar[type[MethodConfig]] = ClipRefineConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="CLIP-Refine: random feature alignment and hybrid contrastive-distillation",
        paper="Yamaguchi et al., CVPR 2025, arXiv:2504.12717",
        equations=(
            "z ~ N(0, I) for each pair and step; v, t: the student's embeddings, not normalised; D channels",
            "L_RaFA = mean (v - z)² + mean (t - z)², over samples and channels",
            "q_v = α I + (1-α) σ(S_T), q_t = α I + (1-α) σ(S_Tᵀ), T: the student before the first step",
            "L_HyCD = 1/2 [KL(q_v ‖ σ(S)) + KL(q_t ‖ σ(Sᵀ))]; S = s N(v) N(t)ᵀ, published: v tᵀ",
            "L = reference_weight L_RaFA + distill_weight L_HyCD + task_weight L_contrastive",
        ),
        needs="embeddings and logit scales of both models; a trained student, with `teacher: student`",
        trainable="the student",
        departures=(
            "Softmaxes are of scaled cosines; similarity: raw takes the published inner products of embeddings as they "
            "are. These count on the norms of OpenAI's models.",
            "z is a function of seed and step, the same in all processes.",
            "In expectation over z, L_RaFA has the gradient of mean v² + mean t², whether z is shared or not. "
            "references: own and references: zero are controls.",
            "Any teacher will do, also one of another width; published is a frozen copy of the student.",
            "AdamW with this toolkit's schedule; published: rate 1e-6, weight decay 0.1, one epoch in batches of 512.",
        ),
        checked_against="formulas written out in loops; the licence of the published code allows evaluation alone, so "
        "none of its numbers are kept here",
    )

    def __init__(self, config: ClipRefineConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        self.weights = {
            "reference": config.reference_weight,
            "similarity": config.distill_weight,
            "contrastive": config.task_weight,
        }

    def terms(self, batch: Batch) -> dict[str, Term]:
        student = self.encode_student(batch)
        values: dict[str, Tensor] = {}
        if self.wants("reference"):
            values["reference"] = self._to_references(student)
        if self.wants("similarity"):
            values["similarity"] = self._to_mixture(student, self.encode_teacher(batch))
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        return self.weighted(values)

    def _to_references(self, student: Features) -> Tensor:
        image, text = embeddings_of(student)
        if self.config.references == "zero":
            return reference_distance(image, torch.zeros_like(image)) + reference_distance(text, torch.zeros_like(text))
        generator = self.step.generator("references")
        for_images = torch.randn(image.shape, generator=generator).to(image.device, non_blocking=True)
        for_texts = for_images
        if self.config.references == "own":
            for_texts = torch.randn(text.shape, generator=generator).to(text.device, non_blocking=True)
        return reference_distance(image, for_images) + reference_distance(text, for_texts)

    def _to_mixture(self, student: Features, teacher: Features) -> Tensor:
        raw = self.config.similarity == "raw"
        return hybrid_divergence(
            *embeddings_of(student),
            *embeddings_of(teacher),
            hard_share=self.config.hard_share,
            student_scale=None if raw else student.logit_scale,
            teacher_scale=None if raw else teacher.logit_scale,
        )

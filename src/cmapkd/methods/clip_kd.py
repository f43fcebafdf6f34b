"""CLIP-KD for dual encoders (Yang et al., CVPR 2024, arXiv:2307.12732): every term of the study, each by its weight.

Departures and how they were checked: the card below and docs/methods/clip_kd.md.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cmapkd.data.masks import check_mask
from cmapkd.data.types import Batch
from cmapkd.features import PairProjector
from cmapkd.features.projector import Fusion
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import task_loss
from cmapkd.methods.in_batch import EmbeddingTerms, embeddings_of, pair_distance, similarity_loss
from cmapkd.methods.lent import LentConfig, LentMethod
from cmapkd.methods.own_scales import ScaleForm, factor, keep_in_range, new_scale
from cmapkd.methods.step import StepInfo
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher
from cmapkd.objectives import contrastive_loss, gradient_distance, interactive_divergence, interactive_loss
from cmapkd.objectives.common import unit

PUBLISHED_GRADIENT_WEIGHT = 1e8 / (1024**2 * 512)  # restated as that of features, and for a sum over 1,024 pairs


class ClipKDConfig(LentConfig, EmbeddingTerms):
    """The weight of each term; a weight of zero switches its computation off. By default the published combination."""

    masked_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the distance of embeddings with squares of the student's picture hidden; one more pass "
        "of its image tower. Published: 2000 of the mean over channels, at width 512 3.90625 here.",
    )
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="Share of the squares that are hidden.")
    mask_patch: int = Field(16, ge=1, description="Side of a square in pixels of the student; best its patch size.")
    relational_weight: float = Field(1.0, ge=0, description="Weight of the KL between in-batch similarities.")
    gradient_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared distance between gradients of the contrastive losses. Published: 1e8 of the "
        "mean over channels, at width 512 and batch 1024 0.186 here, with gradient_convention: official.",
    )
    gradient_convention: Literal["paper", "official"] = Field(
        "paper",
        description="paper: the gradients of the contrastive loss itself; official: its logits are divided by the "
        "logit scale, as the published code does by giving the scale where a temperature is meant.",
    )
    cross_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL over the teacher's other modality; in the published code, not its recipes.",
    )
    augmented_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of InfoNCE between embeddings that are fused with the teacher's. Published: none.",
    )
    interactive_scale: ScaleForm = Field(
        "exp",
        description="exp: the learned scales of the interactive, cross and augmented terms are exponentiated and "
        "clamped as CLIP's; official: used raw, as in the published code (they start at 2.66 instead of 14.3).",
    )


class ClipKD(LentMethod):
    """The student imitates the teacher's embeddings and similarities, and is contrasted with its other modality."""

    Config: ClassVar[type[MethodConfig]] = ClipKDConfig
    steady = True
    contrasts = ("contrastive", "interactive", "augmented")
    card: ClassVar[MethodCard] = MethodCard(
        title="CLIP-KD: feature, relational, gradient and interactive distillation of dual encoders",
        paper="Yang et al., CVPR 2024, arXiv:2307.12732",
        equations=(
            "v̂ = N(W_v v_S), t̂ = N(W_t t_S) (linear maps only where the widths differ)",
            "L_FD = |v̂ - v_T|² + |t̂ - t_T|², batch mean; L_MFD the same, v_S of a picture with hidden squares",
            "L_CRD = 1/2 [KL(σ(s_T v_T t_Tᵀ) ‖ σ(s_S v_S t_Sᵀ)) + the transposed]",
            "L_GD = |G_v(v̂, t̂, s_S) - G_v(v_T, t_T, s_T)|² + ... over image and text as anchor and as candidate, "
            "G_p = s (P - I) k, G_k = s (P - I)ᵀ p, P = σ(s p kᵀ)",
            "L_ICL = 1/2 [CE(c v̂ t_Tᵀ, diag) + CE(c t̂ v_Tᵀ, diag)]",
            "L_cross = 1/2 [KL(σ(s_T v_T t_Tᵀ) ‖ σ(c v̂ t_Tᵀ)) + KL(σ(s_T t_T v_Tᵀ) ‖ σ(c t̂ v_Tᵀ))]",
            "L_AFD = 1/2 [CE(f f_v f_tᵀ, diag) + transposed], f_v = N(U_v [v̂; v_T]), f_t = N(U_t [t̂; t_T])",
            "L = L_contrastive + 3.9 L_FD + L_CRD + L_ICL + 0 (L_MFD + L_GD + L_cross + L_AFD)",
        ),
        needs="embeddings and logit scales of both models; the masked term one more pass of the student's image tower",
        trainable="the student, W_v and W_t where the widths differ, U_v and U_t, the logit scales c and f",
        departures=(
            "L_FD and L_MFD are sums over channels, so their weight keeps its meaning at any width: 2000 × mean at "
            "width 512 is 3.9 × this sum. L_GD is so too, and of the loss summed over the batch: 1e8 × mean at width "
            "512 and batch 1024 is 0.186 × this.",
            "c and f are exponentiated and clamped to [1, 100] like CLIP's scale; interactive_scale: official restores "
            "the published code, which uses the logarithms themselves.",
            "G multiplies by the logit scale; gradient_convention: official divides by it, as the published code does.",
            "L_MFD hides squares of pixels, which any tower can be shown, instead of dropping a transformer's patches: "
            "it saves no time. Only this term sees them, in a pass of its own. The released code computes the masked "
            "pass and overwrites it, so that its L_MFD is L_FD.",
            "U_v and U_t map 2 × the teacher's width to the student's; the published ones fail where widths differ.",
            "hints, bank_weight and projector: shared are no part of CLIP-KD and are off. They are cmapkd's, so that a "
            "comparison can give CLIP-KD each of them.",
        ),
        checked_against="the published loss class run on random embeddings: values and gradients of every term, "
        "tests/methods/fixtures/clip_kd.json",
    )

    config: ClipKDConfig

    def __init__(self, config: ClipKDConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config = config
        self.weights = {
            "contrastive": config.task_weight,
            "relational": config.relational_weight,
            "feature": config.feature_weight,
            "masked_feature": config.masked_weight,
            "gradient": config.gradient_weight,
            "interactive": config.interactive_weight,
            "cross": config.cross_weight,
            "augmented": config.augmented_weight,
            "bank": config.bank_weight,
            "hints": float(any(config.hints.values())),
        }
        terms = {*self.term_names}
        alone = {"contrastive", "relational", "hints"}
        self.project = self.make_projector(student, teacher) if terms - alone else None
        self.bank = self.make_bank(teacher)
        self.interactive_scale = new_scale() if terms & {"interactive", "cross"} else None
        self.fusion = Fusion(student.embed_dim, teacher.embed_dim) if config.augmented_weight else None
        self.fusion_scale = new_scale() if config.augmented_weight else None
        # last, so that the other parts begin with the same draws with hints and without
        self.hints = self.make_hints(student, teacher)
        if config.masked_weight:
            check_mask(student.image_spec.size, patch=config.mask_patch, ratio=config.mask_ratio)

    @property
    def why_student_live(self) -> str | None:
        if self.config.masked_weight:
            return "its masked pictures are encoded anew in every step"
        return super().why_student_live

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The terms of the stage; embeddings and hints' distances are of all processes' samples."""
        student, teacher, hints = self.encode_with_hints(batch)
        values = {} if hints is None else {"hints": hints}
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        if self.wants("relational"):
            values["relational"] = similarity_loss(student, teacher)
        if self.project is not None:
            values |= self._projected_terms(batch, self.project, student, teacher)
        return {name: Term(value, self.weights[name]) for name, value in values.items()}

    def _projected_terms(
        self, batch: Batch, project: PairProjector, student: Features, teacher: Features
    ) -> dict[str, Tensor]:
        """The terms that compare the student with the teacher at the teacher's width."""
        projected = project(student)
        of_student, of_teacher = embeddings_of(projected), embeddings_of(teacher)
        values: dict[str, Tensor] = {}
        if self.wants("feature"):
            values["feature"] = pair_distance(of_student, of_teacher)
        if self.wants("masked_feature"):
            patch, ratio = self.config.mask_patch, self.config.mask_ratio
            masked = project.of_images(self.encode_hidden_images(batch, patch=patch, ratio=ratio))
            values["masked_feature"] = pair_distance((masked, of_student[1]), of_teacher)
        if self.wants("gradient"):
            own, other = student.logit_scale, teacher.logit_scale
            if self.config.gradient_convention == "official":
                own, other = own.reciprocal(), other.reciprocal()
            values["gradient"] = gradient_distance(*of_student, *of_teacher, student_scale=own, teacher_scale=other)
        if self.interactive_scale is not None:
            scale = factor(self.interactive_scale, self.config.interactive_scale)
            if self.wants("interactive"):
                values["interactive"] = interactive_loss(
                    *of_student, *of_teacher, logit_scale=scale, pictures=student.pictures
                )
            if self.wants("cross"):
                values["cross"] = interactive_divergence(
                    *of_student, *of_teacher, student_scale=scale, teacher_scale=teacher.logit_scale
                )
        if self.fusion is not None and self.fusion_scale is not None and self.wants("augmented"):
            fused = self.fusion([*map(unit, of_student)], [*map(unit, of_teacher)])
            scale = factor(self.fusion_scale, self.config.interactive_scale)
            values["augmented"] = contrastive_loss(*fused, logit_scale=scale, pictures=student.pictures)
        if self.bank is not None and self.wants("bank"):
            values["bank"] = self.against_bank(self.bank, batch, of_student, of_teacher, teacher.logit_scale)
        return values

    @torch.no_grad()
    def after_step(self, step: StepInfo | None = None) -> None:
        super().after_step(step)
        keep_in_range((self.interactive_scale, self.fusion_scale), self.config.interactive_scale)

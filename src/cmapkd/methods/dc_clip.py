"""DC-CLIP (arXiv:2404.11249): each tower alone imitates its teacher's, then both are aligned. A reconstruction.

No code of it was found, nor the paper's formulas in full: stage 1 is SmoothL1 between features through an adapter,
tower by tower, and stage 2 InfoNCE. Which features, beta, weights and lengths are choices made here: no parity is
claimed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from cmapkd.data.types import Batch
from cmapkd.features import PairProjector
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod, task_loss
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, FrozenTeacher
from cmapkd.objectives import smooth_distance


class DCClipConfig(MethodConfig):
    """What each term counts, and how the towers reach the teacher's width."""

    feature_weight: float = Field(1.0, ge=0, description="Weight of the SmoothL1 of each tower's features.")
    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")
    beta: float = Field(1.0, gt=0, description="Where SmoothL1 turns from squares to absolute values.")
    adapter: Literal["own", "shared"] = Field(
        "own", description="To the teacher's width: one linear map a tower, or the same for both; dropped afterwards."
    )


class DCClip(DualEncoderMethod):
    """Image and text tower are distilled by themselves, then meet in a contrastive loss."""

    Config: ClassVar[type[MethodConfig]] = DCClipConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="DC-CLIP: towers distilled apart, then aligned (a reconstruction)",
        paper="Zhang et al. 2024, arXiv:2404.11249; Pattern Recognition 2025",
        equations=(
            "stage 1: L_v = SmoothL1(A_v v_S, v_T), L_t = SmoothL1(A_t t_S, t_T), mean over batch and channels",
            "stage 2: L_CL = 1/2 [CE(s v tᵀ, diag) + CE(s t vᵀ, diag)]",
            "L = feature_weight (L_v + L_t) + task_weight L_CL, each in its stage",
        ),
        needs="embeddings of both models; texts are compared sentence by sentence, so tokenizers may differ. "
        "training.stages divide the run",
        trainable="the student, A_v and A_t where the widths differ (dropped afterwards)",
        departures=(
            "A reconstruction: the published formulas are known from summaries, code was not found.",
            "Features are the towers' embeddings before they are normalised, not feature maps.",
            "Without training.stages all terms count from the first step.",
        ),
        checked_against="torch's smooth_l1_loss; open_clip's ClipLoss. No published code exists to compare with",
    )

    def __init__(self, config: DCClipConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config = config
        self.weights = {
            "image_feature": config.feature_weight,
            "text_feature": config.feature_weight,
            "contrastive": config.task_weight,
        }
        self.adapt = PairProjector(student.embed_dim, teacher.embed_dim, shared=config.adapter == "shared")

    def terms(self, batch: Batch) -> dict[str, Term]:
        student = self.encode_student(batch)
        values: dict[str, Tensor] = {}
        towers = [tower for tower in ("image", "text") if self.wants(f"{tower}_feature")]
        if towers:
            adapted, teacher = self.adapt(student), self.encode_teacher(batch)
            for tower in towers:
                ours, theirs = (getattr(features, tower).embedding for features in (adapted, teacher))
                values[f"{tower}_feature"] = smooth_distance(ours, theirs, beta=self.config.beta)
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        return self.weighted(values)

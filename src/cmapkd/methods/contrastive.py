"""Contrastive training without a teacher (CLIP, arXiv:2103.00020; SigLIP, arXiv:2303.15343).

The scratch baseline that every distillation is measured against, and how a teacher is trained.
"""

from __future__ import annotations

from typing import ClassVar

from cmapkd.data.types import Batch
from cmapkd.features import own_place
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod, task_loss
from cmapkd.methods.sigmoid_ring import ring_sigmoid_loss
from cmapkd.methods.terms import Term


class ContrastiveConfig(MethodConfig):
    """No settings: the student decides between softmax (CLIP) and sigmoid (SigLIP, which has a logit bias)."""


class Contrastive(DualEncoderMethod):
    """Each image finds its text in the batch, and each text its image."""

    Config: ClassVar[type[MethodConfig]] = ContrastiveConfig
    uses_teacher: ClassVar[bool] = False
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="Contrastive training, no teacher",
        paper="Radford et al. 2021, arXiv:2103.00020; with a logit bias Zhai et al. 2023, arXiv:2303.15343",
        equations=(
            "L = 1/2 [CE(s v tᵀ, diag) + CE(s t vᵀ, diag)]",
            "with a logit bias b: L = -(1/B) Σ_ij log σ(z_ij (s v_i·t_j + b)), z = +1 on the diagonal, else -1",
        ),
        needs="student embeddings and logit scale",
        trainable="the student",
        departures=(),
        checked_against="both formulas written out; open_clip's ClipLoss and SigLipLoss",
    )

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("contrastive",)

    def terms(self, batch: Batch) -> dict[str, Term]:
        own = self.encode_own(batch)
        if own.logit_bias is not None and self.local_loss and own_place()[1] > 1:
            return {"contrastive": Term(ring_sigmoid_loss(own, self._pictures(batch)))}
        return {"contrastive": Term(task_loss(self.gathered(batch, own)))}

"""ACAM-KD for dual encoders (Lan & Tian, ICCV 2025, arXiv:2503.06307): masks that student and teacher make together.

A reconstruction: equations of a third party's notes on the paper, which has no published code. Departures: the card.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.data.types import Batch
from cmapkd.features import standardise
from cmapkd.features.cooperative_masks import CooperativeMasks, of_largest_one, share_of
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import task_loss
from cmapkd.methods.image_tokens import ImageTokens, TokenLayers, TokenMethod
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher
from cmapkd.objectives import mask_overlap, masked_error
from cmapkd.objectives.common import at_least_float32


class AcamConfig(TokenLayers):
    """What each term counts, and how the masks are made."""

    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")
    channel_weight: float = Field(1.0, ge=0, description="Weight of the error under masks of channels.")
    spatial_weight: float = Field(1.0, ge=0, description="Weight of the error under masks of places.")
    diversity_weight: float = Field(1.0, ge=0, description="Weight of the overlap of the masks, of both kinds.")
    masks: Literal["cooperative", "teacher", "none"] = Field(
        "cooperative",
        description="cooperative: learned, of both models' tokens; teacher: the mean squares of the teacher's tokens, "
        "which never change; none: every place and channel alike.",
    )
    num_masks: int = Field(6, ge=2, description="Cooperative masks of each kind. Published: 6 for detection.")
    mask_gradient: Literal["both", "diversity"] = Field(
        "both",
        description="both: masks learn from the errors that they weigh and from their overlap, as printed; diversity: "
        "from the overlap alone, so that they do not learn to leave large errors.",
    )
    normalise_masks: bool = Field(
        True,
        description="Divide each masked error by its mask's sum, and compare masks of length 1 with each other. false: "
        "the printed form, which the masks lower by vanishing.",
    )
    standardise: bool = Field(
        True,
        description="Compare tokens whose channels have mean 0 and variance 1, so that weights mean the same for any "
        "model. Printed: tokens as they are.",
    )

    @model_validator(mode="after")
    def _masks_learn_from_something(self) -> Self:
        if self.masks == "cooperative" and self.mask_gradient == "diversity" and not self.diversity_weight:
            raise ValueError(
                "with mask_gradient: diversity and diversity_weight: 0 no mask would learn: give diversity_weight a "
                "number above 0, or set masks: none"
            )
        return self


class AcamKD(TokenMethod):
    """The student's patch tokens follow the teacher's where masks say, and the masks change with the student."""

    Config: ClassVar[type[MethodConfig]] = AcamConfig
    token_terms: ClassVar[tuple[str, ...]] = ("channel", "spatial", "diversity")
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="ACAM-KD, adaptive and cooperative attention masks (a reconstruction of third-party notes)",
        paper="Lan & Tian, ICCV 2025, arXiv:2503.06307",
        equations=(
            "F_S = N(P f_S), F_T = N(f_T): cells of the student's grid, channels standardised; P linear",
            "F = σ(W_q F_T (W_k F_S)ᵀ / sqrt(C/2)) W_v F_S",
            "M^c = sigmoid(m^c v) [M C], v the mean of F over cells; M^s = sigmoid(m^s Fᵀ) [M HW]",
            "L_c = mean over masks of Σ_c M^c_c e_c / Σ_c M^c_c, e_c the mean over cells of (F_S - F_T)²",
            "L_s = mean over masks of Σ_i M^s_i e_i / Σ_i M^s_i, e_i the mean over channels of (F_S - F_T)²",
            "L_div = mean over pairs of cos(M_i, M_j), of M^c plus of M^s; printed: 2 M_i · M_j / (|M_i|² + |M_j|²)",
            "L = L_contrastive + L_c + L_s + L_div",
        ),
        needs="one level of both image towers; the student's embeddings and logit scale",
        trainable="the student, P, W_q, W_k, W_v, m^c and m^s (none of them in the student that is saved)",
        departures=(
            "A reconstruction: the equations are those of a third party's notes, without the normalisation of the "
            "masked errors. The task is the student's contrastive loss.",
            "Each masked error is divided by the sum of its mask. Undivided, masks lower the loss by vanishing.",
            "Dice coefficients are taken pair by pair, of masks of length 1. As printed, a mask that vanishes overlaps "
            "with no other. normalise_masks: false restores both.",
            "Tokens are standardised by default; standardise: false compares them as they are.",
            "Keys and values read P f_S, so that all features have the teacher's width.",
            "The published inheritance of the teacher's head is left out.",
        ),
        checked_against="the formulas written out in loops, and gradcheck; there is no published code",
    )

    def __init__(self, config: AcamConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config = config
        self.weights = {
            "contrastive": config.task_weight,
            "channel": config.channel_weight,
            "spatial": config.spatial_weight,
            "diversity": config.diversity_weight if config.masks == "cooperative" else 0.0,
        }
        self.levels = ImageTokens(config, student=student, teacher=teacher.model)
        reads = bool({*self.term_names} - {"contrastive"})
        width = self.levels.widths[1]
        self.adapt = nn.Linear(*self.levels.widths) if reads else None
        self.masks = CooperativeMasks(width, config.num_masks) if reads and config.masks == "cooperative" else None

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, _, rows = self.encode_both(batch, self._errors)
        values = {name: rows[name].mean() for name in ("channel", "spatial", "diversity") if name in rows}
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        self._measure(rows)
        return self.weighted(values)

    def _errors(self, part: Batch, student: Features, teacher: Features) -> Mapping[str, Tensor]:  # noqa: ARG002
        """What each sample adds to the terms, and the sizes of its masks; of this process's samples."""
        if not self.reads_tokens or self.adapt is None:
            return {}
        ours, raw = self.levels.cells(student, teacher)
        ours, theirs = self.adapt(ours), raw
        if self.config.standardise:
            ours, theirs = standardise(ours), standardise(theirs)
        squares = (at_least_float32(ours) - at_least_float32(theirs)).square()
        errors = {"channel": squares.mean(1), "spatial": squares.mean(2)}
        learned = self.masks is not None
        masks = self._masks(ours, theirs, raw)
        divided, learning = self.config.normalise_masks or not learned, self.config.mask_gradient == "both"
        rows: dict[str, Tensor] = {}
        for name, logits in masks.items():
            mask = of_largest_one(logits) if divided and learned else logits.sigmoid() if learned else logits
            masks[name] = mask
            if self.wants(name):
                rows[name] = masked_error(errors[name], mask if learning else mask.detach(), divided=divided)
            if learned:
                rows[f"{name} size"] = logits.detach().sigmoid().mean(-1)
                rows[f"{name} share"] = share_of(mask.detach())
        if self.wants("diversity"):
            overlaps = [mask_overlap(mask, of_one_length=divided) for mask in masks.values()]
            rows["diversity"] = torch.stack(overlaps).sum(0)
        return {**rows, "plain": squares.detach().mean((1, 2))}

    def _masks(self, ours: Tensor, theirs: Tensor, raw: Tensor) -> dict[str, Float[Tensor, "batch masks items"]]:
        """Learned masks before the sigmoid, or weights that do not learn; of channels and of places."""
        if self.masks is not None:
            channel, spatial = (at_least_float32(logits) for logits in self.masks(ours, theirs))
        elif self.config.masks == "teacher":
            energy = at_least_float32(raw).square()
            channel, spatial = energy.mean(1, keepdim=True), energy.mean(2)[:, None]
        else:
            channel, spatial = torch.ones_like(theirs[:, :1]), torch.ones_like(theirs[:, None, :, 0])
        return {"channel": channel, "spatial": spatial}

    def _measure(self, rows: Mapping[str, Tensor]) -> None:
        """Of each kind: the masks' mean size, the smallest one's, the share that they weigh, error by plain error."""
        for name in ("channel", "spatial") if self.masks is not None else ():
            if name in rows:
                sizes = rows[f"{name} size"].mean(0)
                self.measurements[f"masks/{name}"] = sizes.mean()
                self.measurements[f"masks/{name}_least"] = sizes.min()
                self.measurements[f"masks/{name}_share"] = rows[f"{name} share"].mean()
                self.measurements[f"masks/{name}_error"] = rows[name].detach().mean() / rows["plain"].mean()

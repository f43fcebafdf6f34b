"""Settings of `mst_distill`: its networks, masks and gate, the stages, and what each term counts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cmapkd.methods.classifying import ClassifyingConfig
from cmapkd.methods.stages import StageConfig
from cmapkd.models.types import Tower

Reads = Literal["joint", "text", "image"]
"""What a network reads of a sample: picture and caption, the caption, or the picture."""

TOWERS: dict[Reads, tuple[Tower, ...]] = {"joint": ("image", "text"), "text": ("text",), "image": ("image",)}
STAGES = (
    StageConfig(name="together", share=0.2, terms=("labels", "network_labels", "mutual")),
    StageConfig(name="masks", share=0.1, terms=("masks",), train=("modules",)),
    StageConfig(name="distil", share=0.7, terms=("labels", "routed", "balance")),
)
TRAINED_BY = {
    "specialists.networks.": ("network_labels", "mutual"),
    "specialists.masks.": ("masks",),
    "gate.": ("balance",),
}
"""Modules by the beginning of their parameters' names, and the terms that train them."""


class MstDistillConfig(ClassifyingConfig):
    """The networks on the teachers, how they are masked and chosen, and what each term counts."""

    networks: tuple[Reads, ...] = Field(
        ("joint", "text"),
        min_length=1,
        description="What the networks of each teacher read: joint (picture and caption), text, image. A teacher "
        "without a text tower has one of images.",
    )
    hidden: int = Field(128, ge=2, description="Units of a network's first layer; its second has half of them.")
    mask_layers: int = Field(
        2,
        ge=0,
        le=2,
        description="Specialists of each network, each with one layer masked; 0: the networks as they are.",
    )
    mask_heads: int = Field(3, ge=1, description="Heads of the attention in a mask.")
    routing: Literal["gate", "random", "mean"] = Field(
        "gate",
        description="Who teaches a sample. gate: the specialists that a gate on the student's scores finds likeliest; "
        "random: any, a control; mean: all, each alike.",
    )
    top: int = Field(1, ge=1, description="Specialists that teach a sample, by gate or at random.")
    stacked: bool = Field(
        False,
        description="Whether the second specialist of a network keeps the first one's mask while it teaches, as in the "
        "published code.",
    )
    temperature: float = Field(4.0, gt=0, description="Divides all logits in the KLs.")
    label_weight: float = Field(1.0, gt=0, description="Weight of the cross-entropies of student and networks.")
    mutual_weight: float = Field(1.0, ge=0, description="Weight of the KLs between student and networks.")
    distill_weight: float = Field(1.0, ge=0, description="Weight of the KL from the chosen specialists, at first.")
    balance_weight: float = Field(
        1.0, ge=0, description="Weight of the gate's balance, at first; the gate learns by this term alone."
    )
    fade: bool = Field(
        True,
        description="Whether the last two weights fall in the last stage, as published: distill_weight to a half after "
        "1, 31, 61 and 91 % of it, balance_weight to nine tenths after 1, 11, ..., 91 %.",
    )

    @property
    def reads_captions(self) -> bool:
        return self.networks != ("image",)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.networks)) < len(self.networks):
            raise ValueError(f"networks is {list(self.networks)}: name each kind once")
        if self.mask_layers and self.hidden < (least := 2 * self.mask_heads * self.mask_layers):
            raise ValueError(
                f"hidden is {self.hidden}: masks of {self.mask_heads} heads on {self.mask_layers} layers need {least} "
                "or more"
            )
        if self.routing == "gate" and not self.balance_weight:
            raise ValueError(
                "balance_weight is 0, and the gate learns by this term alone: take routing: random or mean"
            )
        return self

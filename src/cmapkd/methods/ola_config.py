"""The settings of `ola_vlm`: what experts teach which layers, how large the heads are, and what each term counts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cmapkd.config import Config
from cmapkd.features.taps import Layer
from cmapkd.methods.generative import GenerativeConfig


class ExpertConfig(Config):
    """What one expert teaches, and where."""

    layers: tuple[Layer, ...] = Field(
        (0.375, 0.625),
        min_length=1,
        description="Layers of the language model that predict: names (layers.3), or shares of the depth.",
    )
    target: Layer = Field(
        "embedding",
        description="What is predicted: embedding, the expert's image embedding; or the tokens of one of its levels, "
        "by name (blocks.3) or share of its depth.",
    )
    weight: float = Field(0.5, ge=0, description="Weight of this expert's terms.")


class OlaVLMConfig(GenerativeConfig):
    """What experts teach which layers, how large the heads are, and what each term counts."""

    experts: dict[str, ExpertConfig] = Field(
        default_factory=dict, description="Settings by a teacher's name in the run; others have the defaults."
    )
    answers_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    contrast_weight: float = Field(0.3, ge=0, description="Weight of the contrastive part, times the expert's weight.")
    log_scale: float = Field(2.0, description="Log of the factor of cosines at first; it learns, up to log 100.")
    reads: Literal["all", "picture"] = Field(
        "all", description="What heads read: all states of a dialogue, or those of its visual tokens alone."
    )
    depth: int = Field(1, ge=1, description="Layers of a head.")
    heads: int = Field(4, ge=1, description="Attention heads in each layer of a head.")
    head_width: int = Field(32, ge=1, description="Channels of each of these attention heads.")
    factor: int = Field(1, ge=1, description="Width inside a head's feed-forward network, in widths of the target.")
    form: Literal["two_stages", "one_stage"] = Field(
        "two_stages",
        description="two_stages: projector and heads learn all terms, then all of the student answers alone, where the "
        "recipe names no stages; one_stage: all terms and all parts from the first step on.",
    )
    targets: Literal["own", "shuffled"] = Field(
        "own", description="shuffled: each picture's targets are those of another one, the control that must fail."
    )

    @model_validator(mode="after")
    def _settings_are_read(self) -> OlaVLMConfig:
        for role, expert in self.experts.items():
            if not expert.weight and expert != ExpertConfig(weight=0):
                raise ValueError(f"experts.{role} has weight 0, so its other settings are not read: leave them out")
        if not self.contrast_weight and self.changed("log_scale"):
            raise ValueError("contrast_weight is 0, so log_scale is not read: leave it out")
        if not self.answers_weight and self.form == "two_stages":
            raise ValueError(
                "answers_weight is 0, and the second of the two stages learns from answers alone: give it a weight, or "
                "set form: one_stage"
            )
        return self

"""The settings of `move_kd`: which tokens are compared, and how tokens, encoders and terms are weighed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cmapkd.features.taps import Layer
from cmapkd.methods.generative import GenerativeConfig


class MoveKDConfig(GenerativeConfig):
    """Which tokens are compared, and how tokens, encoders and terms are weighed."""

    levels: dict[str, Layer] = Field(
        default_factory=dict,
        description="The level of an encoder by its name in the run: a name, or a share of the depth. Default: the "
        "last but one of the first encoder, as published, and the last of others.",
    )
    anchor_share: float = Field(
        0.8, ge=0, le=1, description="How much the first encoder counts; the others share the rest."
    )
    shares: Literal["alike", "equal"] = Field(
        "alike", description="alike: the more an encoder is like the first one, the more it counts; equal: alike all."
    )
    token_weights: Literal["attention", "equal"] = Field(
        "attention", description="attention: tokens to which the first encoder's class token attends count more."
    )
    answers_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    distill_weight: float = Field(0.5, gt=0, description="Weight of the errors of visual tokens.")
    form: Literal["two_stages", "one_stage"] = Field(
        "two_stages",
        description="two_stages: vision tower, projector and adapters learn, then everything, where the recipe names "
        "no stages; one_stage: everything from the first step on.",
    )

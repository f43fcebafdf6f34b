"""Settings of `linearize`, and the stages of its three forms."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cmapkd.methods.generative import GenerativeConfig, Reduction
from cmapkd.models.linear_vlm import MIXERS

STAGES: dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {  # name, terms, parts that learn
    "mmmamba": (
        ("new parts", ("layers",), ("mixers",)),
        ("queries, keys, values", ("layers",), ("mixers", "mixer_inputs")),
        ("end to end", ("distillation", "answers"), ("mixers", "mixer_inputs")),
    ),
    "infinitevl": (("layers", ("layers",), MIXERS), ("end to end", ("distillation", "answers"), MIXERS)),
    "matvlm": (("whole", ("layers", "distillation", "answers"), (*MIXERS, "projector")),),
}


class LinearizeConfig(GenerativeConfig):
    """What of a layer is compared, and what each term counts; `linear:` students say which layers are converted."""

    form: Literal["infinitevl", "mmmamba", "matvlm"] = Field(
        "mmmamba",
        description="mmmamba: what attention gives to its output projection, in three stages; infinitevl: outputs of "
        "layers, in two; matvlm: their distance, with the tokens in one stage.",
    )
    layers_weight: float | None = Field(
        None, gt=0, description="Weight of the layers' errors. None: 1000 of mmmamba and infinitevl, 1 of matvlm."
    )
    distill_weight: float = Field(1.0, ge=0, description="Weight of the divergence of next tokens.")
    answers_weight: float = Field(0.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    temperature: float | None = Field(
        None, gt=0, description="Of the divergence, which is times its square. None: 2 of infinitevl, 1 of others."
    )
    reduction: Reduction = Field(
        "batch_sum", description="Of terms over tokens: batch_sum, the sum divided by samples; token_mean; sample_mean."
    )
    targets: Literal["own", "shuffled"] = Field(
        "own", description="shuffled: each converted layer learns what the next converted one gave. A control."
    )

    @property
    def not_cached(self) -> str | None:
        return "layers of the student are given what the teacher's layers were given, and a cache holds answers alone"

    @model_validator(mode="after")
    def _tokens_may_be_left_out(self) -> LinearizeConfig:
        if self.temperature is not None and not self.distill_weight:
            raise ValueError(f"distill_weight is 0, so nothing reads temperature ({self.temperature:g}): leave it out")
        if self.changed("reduction") and not (self.distill_weight or self.answers_weight):
            raise ValueError("no term is over tokens, so nothing reads reduction: leave it out")
        return self

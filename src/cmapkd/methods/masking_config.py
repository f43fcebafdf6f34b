"""The settings of `masking_kd`: what is hidden from the student, and what each term counts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cmapkd.methods.generative import GenerativeConfig

_HIDING = ("least", "most", "scale", "budget", "fallback", "low")


class MaskingKDConfig(GenerativeConfig):
    """What is hidden from the student, and what each term counts."""

    divergence: Literal["reverse", "forward", "jsd"] = Field(
        "reverse", description="Between next-token distributions of the masked student and of the teacher."
    )
    temperature: float = Field(2.0, gt=0, description="Divides both models' logits; the term is times its square.")
    least: float = Field(0.3, ge=0, le=1, description="Share of attention that is hidden behind the hardest tokens.")
    most: float = Field(0.5, ge=0, le=1, description="Share of attention that is hidden behind the easiest tokens.")
    scale: float = Field(1.0, gt=0, description="Divides log divergences; the larger, the more alike all shares are.")
    budget: float = Field(0.3, ge=0, le=1, description="Most of the earlier tokens of an answer that are hidden.")
    fallback: float = Field(
        0.1, ge=0, le=1, description="Share of the tokens that is hidden where they get less attention than `low`."
    )
    low: float = Field(0.1, ge=0, le=1, description="Attention to an answer's earlier tokens below which it is little.")
    hide: Literal["attended", "random", "nothing"] = Field(
        "attended",
        description="attended: what gets most attention, as published; random: as many tokens drawn at random, a "
        "control; nothing: the same divergence without a mask.",
    )
    answers_weight: float = Field(0.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    distill_weight: float = Field(1.0, gt=0, description="Weight of the divergence.")

    @property
    def not_cached(self) -> str | None:
        return "it reads all of the teacher's probabilities, and a cache holds the likeliest alone"

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.hide == "nothing" and (given := self.changed(*_HIDING)):
            raise ValueError(f"hide: nothing reads none of {', '.join(given)}: leave them out")
        if self.least > self.most:
            raise ValueError(f"least is {self.least:g} and most {self.most:g}: easy tokens hide more, not less")
        return self

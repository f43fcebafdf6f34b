"""Every item counts the same: the weighting that every other one is measured against."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from cmapkd.weighting.base import Choice, Weighting, WeightingConfig


class UniformConfig(WeightingConfig):
    """No settings."""

    name: Literal["uniform"] = Field("uniform", description="The weighting's name in WEIGHTINGS.")


class UniformWeighting(Weighting):
    """Weight 1 for every active item: the loss is the batch mean of the samples' sums."""

    Config: ClassVar[type[WeightingConfig]] = UniformConfig

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],  # noqa: ARG002  the same for every sample
        active: Bool[Tensor, " items"],
    ) -> Choice:
        return Choice(active.to(losses.dtype).expand_as(losses))

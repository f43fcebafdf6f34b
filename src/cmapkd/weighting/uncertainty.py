"""One learned variance for each item (Kendall, Gal, Cipolla, CVPR 2018, arXiv:1705.07115)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.weighting.base import Choice, Weighting, WeightingConfig, shares


class UncertaintyConfig(WeightingConfig):
    """No settings."""

    name: Literal["uncertainty"] = Field("uncertainty", description="The weighting's name in WEIGHTINGS.")


class UncertaintyWeighting(Weighting):
    """Weights by learned precision: an item whose loss stays large counts less.

    The variances s_i = log σ_i² (0 at the start) minimise the paper's objective of a Gaussian likelihood, on the batch
    means L_i of the losses,
        sum_i exp(-s_i) L_i / 2 + s_i / 2,    so at the optimum s_i = log L_i.
    The items are weighed by exp(-s_i) scaled to mean 1, at the optimum proportional to 1 / L_i.
    Departure: the paper trains the model with exp(-s_i) / 2 itself, whose sum grows without bound as the losses fall.
    Here only the ratios are its own, so that the balance with a run's other terms does not drift.
    """

    Config: ClassVar[type[WeightingConfig]] = UncertaintyConfig

    def __init__(self, config: UncertaintyConfig, *, items: Sequence[str], context_dim: int) -> None:
        super().__init__(config, items=items, context_dim=context_dim)
        self.log_variance = nn.Parameter(torch.zeros(len(items)))

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],  # noqa: ARG002  the same for every sample
        active: Bool[Tensor, " items"],
    ) -> Choice:
        s = self.log_variance
        objective = ((-s).exp() * losses.mean(0) + s).masked_fill(~active, 0.0).sum() / 2
        p, _ = shares(-s[None], active)
        log = {f"log_variance/{item}": value for item, value in zip(self.items, s, strict=True)}
        return Choice((p * active.sum()).expand_as(losses), objective, log)

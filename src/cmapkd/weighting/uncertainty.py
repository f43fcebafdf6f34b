"""One learned variance for each item (Kendall, Gal, Cipolla, CVPR 2018, arXiv:1705.07115)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, field_validator
from torch import Tensor, nn

from cmapkd.config import ConfigError, closest
from cmapkd.weighting.base import Choice, Weighting, WeightingConfig, softmax_over_active


class UncertaintyConfig(WeightingConfig):
    """How fast and how far the variances move, and what they leave alone."""

    name: Literal["uncertainty"] = Field("uncertainty", description="The weighting's name in WEIGHTINGS.")
    speed: float = Field(
        50.0, gt=0, description="Rate of the log variances, as a multiple of optim.weighting_rate; they have far to go."
    )
    log_variance_range: tuple[float, float] = Field(
        (-5.0, 10.0), description="Where log variances are kept: a loss below exp(lowest) gains no more weight."
    )
    fixed: tuple[str, ...] = Field((), description="Items that keep weight 1, as the task's own loss may.")

    @field_validator("log_variance_range")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] <= 0 <= value[1] or value[0] == value[1]:
            raise ValueError(f"{list(value)} must hold 0, where the log variances begin: lowest <= 0 <= highest")
        return value


class UncertaintyWeighting(Weighting):
    """Weights by learned precision: an item whose loss stays large counts less.

    The variances s_i = log σ_i² (0 at the start) minimise the paper's objective of a Gaussian likelihood, on the batch
    means L_i of the losses,
        sum_i exp(-s_i) L_i / 2 + s_i / 2,    so at the optimum s_i = log L_i.
    The items are weighed by exp(-s_i) scaled to mean 1, at the optimum proportional to 1 / L_i: an item multiplied by
    1000 gets a thousandth of the weight. Losses must not be negative; give a divergence rather than a cross-entropy,
    whose floor, the teacher's entropy, would count as loss.

    Departures: the paper trains the model with exp(-s_i) / 2 itself, whose sum grows without bound as the losses fall.
    Here only the ratios are its own, so that the balance with a run's other terms does not drift. The s_i have bounds,
    as a loss that goes to zero would take all the weight. Their gradient is cut at 1/2: a loss of 1000 has one of 500,
    and AdamW would for long measure its own steps by that. They are `speed` times a parameter, so that AdamW moves them
    as much faster than its rate says; it decays no vectors, and so none of them.

    Raises:
        ConfigError: `fixed` names an item that is not weighed.
    """

    Config: ClassVar[type[WeightingConfig]] = UncertaintyConfig
    learned: Tensor

    def __init__(self, config: UncertaintyConfig, *, items: Sequence[str], context_dim: int) -> None:
        super().__init__(config, items=items, context_dim=context_dim)
        for item in config.fixed:
            if item not in items:
                raise ConfigError(f"fixed: unknown item {item!r}{closest(item, items)}; weighed: {', '.join(items)}")
        self.config = config
        self.scaled = nn.Parameter(torch.zeros(len(items)))
        self.learns = [item not in config.fixed for item in items]
        self.register_buffer("learned", torch.tensor(self.learns), persistent=False)
        self.any_learned = any(self.learns)

    @property
    def log_variance(self) -> Float[Tensor, " items"]:
        return self.config.speed * self.scaled

    def set_active(self, active: Sequence[bool]) -> None:
        self.any_learned = any(is_active and learns for is_active, learns in zip(active, self.learns, strict=True))

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],  # noqa: ARG002  the same for every sample
        active: Bool[Tensor, " items"],
    ) -> Choice:
        if self.training:
            with torch.no_grad():
                self.scaled.clamp_(*(bound / self.config.speed for bound in self.config.log_variance_range))
        s, free = self.log_variance, active & self.learned
        slope = ((1 - (-s).exp() * losses.mean(0)) / 2).detach().clamp(-0.5, 0.5)
        objective = (slope * s).masked_fill(~free, 0.0).sum()  # of which only the gradient is used
        weights = (active & ~self.learned).to(losses.dtype)[None]
        if self.any_learned:
            p, _ = softmax_over_active(-s[None], free)
            weights = weights + p * free.sum()
        log = {f"log_variance/{item}": value for item, value in zip(self.items, s, strict=True)}
        return Choice(weights.expand_as(losses), objective, log)

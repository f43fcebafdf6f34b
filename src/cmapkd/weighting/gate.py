"""A small network that reads a sample's context and shares one budget out among the items, without collapsing."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.weighting.base import Choice, Weighting, WeightingConfig, softmax_over_active, with_floor

_LEAST_SPREAD = 1e-3  # of losses whose running mean is 1: differences below a thousandth count as none


class BoundedConfig(WeightingConfig):
    """How far a gate may go."""

    strength: float = Field(
        0.5,
        gt=0,
        description="Of the pull to uniform, in units of the losses' spread: at the optimum no item's weight is more "
        "than exp(1 / strength) times another's. Unused if plain.",
    )
    momentum: float = Field(0.99, ge=0, lt=1, description="Of each item's running mean loss, a step. Unused if plain.")
    temperature: float = Field(1.0, gt=0, description="Where the learned softmax temperature starts.")
    temperature_range: tuple[float, float] = Field((0.25, 4.0), description="Between which it stays; both > 0.")
    floor: float = Field(0.0, ge=0, le=1, description="Share of uniform weights mixed in: no weight is below it.")
    plain: bool = Field(False, description="For ablations: neither pull nor normalisation, which collapses.")

    @model_validator(mode="after")
    def _temperature_in_range(self) -> Self:
        least, most = self.temperature_range
        if not 0 < least <= self.temperature <= most:
            raise ValueError(
                f"temperature {self.temperature} must lie in temperature_range [{least}, {most}], and both ends be > 0"
            )
        return self


class BoundedGate(Weighting):
    """w = n softmax(logits(context) / temperature), learned by gradient together with the student. Starts uniform.

    Why not on the weighted loss itself: sum_i w_i l_i is linear in w, so its minimum is a corner, the item with the
    smallest loss; an entropy bonus of fixed size loses to losses that are large against it. Here instead:

    1. Each loss is divided by its item's running mean, r_i = l_i / m_i, so that an item is not "easy" for being small.
    2. With p = w / n, spread S = max_i r_i - min_i r_i (+ 0.001) of the sample and strength β, the gate minimises
           J = mean_b [ sum_i p_i r_i + β S KL(p || uniform) ],    r and S detached.

    Optimum. For one sample, p_i ∝ exp(-r_i / (β S)); for a context x, p_i(x) ∝ exp(-E[r_i | x] / (β E[S | x])). As
    |E[r_i] - E[r_j]| <= E|r_i - r_j| <= E[S], no two weights differ by a factor over exp(1 / β), whatever the scale of
    the losses: pull and temptation grow together, so neither can be outgrown. Among such p the entropy is smallest
    where every r is at an end of the range (along one logit it first rises and then falls): that is `entropy_floor`.

    On the way. Uniform is within reach and has KL 0, so any gate no worse than uniform has, with KL averaged over
    samples by S, β KL <= TV(p, uniform) <= min(1 - 1/n, sqrt(KL / 2)) (Pinsker). Hence
    KL <= min(1 / (2 β²), (1 - 1/n) / β), for a network of any size, trained or not to the end.

    The learned temperature is softplus of a parameter, clamped to its range; the gradient passes the clamp, so that a
    parameter that went beyond can return.

    Source: section 9.5 of the method's design, for the collapse. The form of the pull is ours.
    """

    running_mean: Tensor
    num_updates: Tensor

    def __init__(self, config: BoundedConfig, *, items: Sequence[str], context_dim: int) -> None:
        super().__init__(config, items=items, context_dim=context_dim)
        self.bounds = config
        self.raw_temperature = nn.Parameter(torch.tensor(math.log(math.expm1(config.temperature))))
        self.register_buffer("running_mean", torch.ones(len(items)))
        self.register_buffer("num_updates", torch.zeros(len(items), dtype=torch.int64))

    @abstractmethod
    def logits(self, context: Float[Tensor, "batch context_dim"]) -> Float[Tensor, "batch items"]:
        """What the network makes of the samples; at first the same for every item."""

    @property
    def temperature(self) -> Float[Tensor, ""]:
        """Divides the logits; within `temperature_range`."""
        free = F.softplus(self.raw_temperature)
        return free + (free.clamp(*self.bounds.temperature_range) - free).detach()

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],
        active: Bool[Tensor, " items"],
    ) -> Choice:
        temperature = self.temperature
        p, divergence = softmax_over_active(self.logits(context.to(temperature.dtype)) / temperature, active)
        weights = with_floor(p, active, self.bounds.floor)
        log = {"gate/temperature": temperature, "gate/divergence": divergence.mean()}
        if self.bounds.plain:
            return Choice(weights, active.sum() * (p * losses).sum(-1).mean(), log)
        if self.training:
            self._follow(losses, active)
        relative = losses / self.running_mean.clamp(min=torch.finfo(torch.float32).tiny)
        highest = relative.masked_fill(~active, -torch.inf).amax(-1)
        lowest = relative.masked_fill(~active, torch.inf).amin(-1)
        spread = highest - lowest + _LEAST_SPREAD
        objective = ((p * relative).sum(-1) + self.bounds.strength * spread * divergence).mean()
        return Choice(weights, active.sum() * objective, log | {"gate/spread": spread.mean()})

    @torch.no_grad()
    def _follow(self, losses: Tensor, active: Tensor) -> None:
        """Moves the running means of active items: a plain mean over the first steps, then with momentum."""
        self.num_updates += active
        rate = (1 / self.num_updates.clamp(min=1)).clamp(min=1 - self.bounds.momentum)
        self.running_mean.lerp_(losses.mean(0).to(self.running_mean), (rate * active).to(self.running_mean))


class GateConfig(BoundedConfig):
    """The network, and how far it may go."""

    name: Literal["gate"] = Field("gate", description="The weighting's name in WEIGHTINGS.")
    hidden: int = Field(64, ge=1, description="Width of the one hidden layer.")


class GateWeighting(BoundedGate):
    """The bounded gate whose network is a perceptron of one hidden layer over the sample's context."""

    Config: ClassVar[type[WeightingConfig]] = GateConfig
    reads_context: ClassVar[bool] = True

    def __init__(self, config: GateConfig, *, items: Sequence[str], context_dim: int) -> None:
        super().__init__(config, items=items, context_dim=context_dim)
        self.hidden = nn.Linear(context_dim, config.hidden)
        self.output = nn.Linear(config.hidden, len(items))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def logits(self, context: Float[Tensor, "batch context_dim"]) -> Float[Tensor, "batch items"]:
        logits: Tensor = self.output(F.gelu(self.hidden(F.layer_norm(context, (self.context_dim,)))))
        return logits


def entropy_floor(num_items: int, strength: float) -> float:
    """Smallest entropy, in nats, that a gate's weights have at its optimum.

    Args:
        num_items: active items, n.
        strength: β > 0.
    Returns:
        min over k of the entropy of n shares of which k are exp(1 / β) times the others; in (0, log n] for n > 1.
    """
    floors = []
    for k in range(1, max(2, num_items)):
        total = k + (num_items - k) * math.exp(-1 / strength)
        # log p is -log(total) for the k large shares and 1/β less for the others, which hold 1 - k / total
        floors.append(math.log(total) + (1 - k / total) / strength)
    return min(floors)

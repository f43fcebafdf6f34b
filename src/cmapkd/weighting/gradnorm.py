"""Gradient norms brought into balance (GradNorm: Chen et al., ICML 2018, arXiv:1711.02257)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveFloat
from torch import Tensor

from cmapkd.config import ConfigError, closest
from cmapkd.weighting.base import Choice, Weighting, WeightingConfig

_FASTEST = 10.0  # a loss that began near zero counts as grown no more than so many times


class GradNormConfig(WeightingConfig):
    """How strongly and how often the norms are balanced."""

    name: Literal["gradnorm"] = Field("gradnorm", description="The weighting's name in WEIGHTINGS.")
    alpha: float = Field(
        1.5, ge=0, description="How much larger a gradient terms that fall slowly may have; 0: all norms equal."
    )
    every: int = Field(10, ge=1, description="Steps between measurements, each a backward pass to one layer a term.")
    update: Literal["solve", "descent"] = Field(
        "solve",
        description="solve: a step towards the weights that minimise the paper's objective, in the logarithm; descent: "
        "a gradient step on it, as in the paper, too small or too large where norms differ by orders of magnitude.",
    )
    rate: float = Field(
        0.3, gt=0, le=1, description="solve: share of the way that a step goes; descent: learning rate of the weights."
    )
    floor: float = Field(1e-6, gt=0, lt=1, description="Smallest weight, where the mean is 1.")
    warmup_steps: int = Field(
        20, ge=1, description="Steps with uniform weights; the mean of a term's losses over its first ones is L(0)."
    )
    initial_losses: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="L(0) of terms whose initial value is known (log of the batch), by name."
    )


def gradnorm_targets(
    norms: Float[Tensor, " items"],
    weights: Float[Tensor, " items"],
    ratios: Float[Tensor, " items"],
    *,
    alpha: float,
    measured: Bool[Tensor, " items"] | None = None,
) -> Float[Tensor, " items"]:
    """What each weighted norm should be: the mean of all weighted norms, times its relative loss to the power alpha.

    Args:
        norms: of each term's gradient at the shared layer, before weighting.
        weights: of the terms.
        ratios: each loss as a share of its initial value; > 0.
        alpha: >= 0; 0 asks for equal norms.
        measured: which terms the means are of; None: all.
    Source: arXiv:1711.02257, equations 1 and 2; constants there, so detached here.
    """
    if measured is None:
        measured = torch.ones_like(norms, dtype=torch.bool)
    return (_mean(weights * norms, measured) * (ratios / _mean(ratios, measured)) ** alpha).detach()


def _mean(values: Float[Tensor, " items"], measured: Bool[Tensor, " items"]) -> Float[Tensor, ""]:
    """Of the measured terms; 0 where there are none. Without looking at which they are, which would wait for a GPU."""
    return torch.where(measured, values, 0.0).sum() / measured.sum().clamp_min(1)


def gradnorm_gradient(
    norms: Float[Tensor, " items"], weights: Float[Tensor, " items"], targets: Float[Tensor, " items"]
) -> Float[Tensor, " items"]:
    """Gradient of sum_i |w_i g_i - target_i| with respect to the weights, in which it is linear piece by piece.

    So the second derivatives of the network that the paper's form asks autograd for are not needed.
    """
    return (weights * norms - targets).sign() * norms


class GradNormWeighting(Weighting):
    """Weights under which every term's gradient has the same norm, but for how much of its loss is left.

    With g_i the norm of the gradient of L_i at the last layer that the terms share, G_i = w_i g_i, r_i = L_i / L_i(0)
    over its mean: the weights minimise sum_i | G_i - mean(G) r_i^alpha |, the right side constant, are kept above
    `floor` and scaled to mean 1 over the active terms. They learn from nothing else, and the network from the weighted
    sum alone.

    Departures: the minimiser is known in closed form, w_i = mean(G) r_i^alpha / g_i, and by default a share of the way
    to it is gone in the logarithm (`update: descent` is the paper's gradient step, plain instead of by Adam). L_i(0) is
    a mean over first steps, as the first value of a distillation loss is an accident. No loss scaler stands between
    loss and gradient here (bf16), so no norm has to be unscaled.

    Raises:
        ConfigError: `initial_losses` names a term that is not weighed.
    """

    Config: ClassVar[type[WeightingConfig]] = GradNormConfig
    reads_gradients: ClassVar[bool] = True
    weight: Tensor
    initial: Tensor
    given: Tensor
    seen: Tensor
    norms: Tensor
    spread: Tensor

    def __init__(self, config: GradNormConfig, *, items: Sequence[str], context_dim: int) -> None:
        super().__init__(config, items=items, context_dim=context_dim)
        for item in config.initial_losses:
            if item not in items:
                raise ConfigError(
                    f"initial_losses.{item}: unknown item{closest(item, items)}; known: {', '.join(items)}"
                )
        self.config, self.steps = config, 0
        self.register_buffer("weight", torch.ones(len(items)))
        self.register_buffer("initial", torch.tensor([config.initial_losses.get(item, 0.0) for item in items]))
        given = torch.tensor([item in config.initial_losses for item in items])
        self.register_buffer("given", given, persistent=False)  # whose L(0) is a setting
        self.register_buffer("seen", torch.zeros(len(items)))  # steps whose losses are in `initial`
        self.register_buffer("norms", torch.zeros(len(items)))  # weighted, when they were last measured
        self.register_buffer("spread", torch.zeros(()))

    @property
    def wants_gradients(self) -> bool:
        return self.steps >= self.config.warmup_steps and self.steps % self.config.every == 0

    @torch.no_grad()
    def observe_gradients(
        self, losses: Float[Tensor, " items"], norms: Float[Tensor, " items"], active: Bool[Tensor, " items"]
    ) -> None:
        measured = active & (norms > 0) & norms.isfinite()  # a term that is zero, and has no gradient, keeps its weight
        norms = torch.where(measured, norms.to(self.weight), 1.0)  # where nothing is measured any number will do
        known = self.initial > 0
        ratios = torch.where(known, losses.to(self.weight) / self.initial.clamp_min(1e-12), 1.0)
        ratios = torch.where(measured, ratios.clamp(1e-6, _FASTEST), 1.0)
        targets = gradnorm_targets(norms, self.weight, ratios, alpha=self.config.alpha, measured=measured)
        balanced = self.weight * norms / (ratios / _mean(ratios, measured)) ** self.config.alpha
        if self.config.update == "solve":
            weights = self.weight * (targets / (self.weight * norms)) ** self.config.rate
        else:
            weights = self.weight - self.config.rate * gradnorm_gradient(norms, self.weight, targets)
        weights = weights.clamp_min(self.config.floor)
        weights = weights * (_mean(self.weight, measured) / _mean(weights, measured))
        moved = measured & (measured.sum() >= 2)  # of one gradient there is nothing to balance
        middle, count = _mean(balanced, measured), measured.sum()
        variance = _mean((balanced - middle).square(), measured) * count / (count - 1).clamp_min(1)
        self.spread.copy_(torch.where(moved.any(), variance.sqrt() / middle, self.spread))
        self.norms.copy_(torch.where(moved, self.weight * norms, self.norms))
        self.weight.copy_(torch.where(moved, weights, self.weight))

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],  # noqa: ARG002  the same for every sample
        active: Bool[Tensor, " items"],
    ) -> Choice:
        if self.training:
            self._note(losses.mean(0), active)
        kept = self.weight.to(losses.dtype) * active
        weights = kept * (active.sum() / kept.sum())
        log = {f"gradient_norm/{item}": value.clone() for item, value in zip(self.items, self.norms, strict=True)}
        return Choice(weights.expand_as(losses), None, {**log, "gradnorm/spread": self.spread.clone()})

    @torch.no_grad()
    def _note(self, losses: Float[Tensor, " items"], active: Bool[Tensor, " items"]) -> None:
        """One step more; during a term's first ones its loss goes into L(0)."""
        self.steps += 1
        taken = active & ~self.given & (self.seen < self.config.warmup_steps)
        self.seen += taken
        step = (losses.to(self.initial) - self.initial) / self.seen.clamp_min(1)
        self.initial += torch.where(taken, step, 0.0)

    def get_extra_state(self) -> Tensor:
        """How many steps were weighed, on the host, where asking whether a measurement is due waits for no device."""
        return torch.tensor([self.steps])

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state[0])

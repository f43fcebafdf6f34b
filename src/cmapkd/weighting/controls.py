"""Balancing without held-out pairs, as controls for what does read them: random, by rate, by FAMO, by small losses."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from cmapkd.weighting.base import Choice, Weighting, WeightingConfig, softmax_over_active

_TINY = 1e-8  # FAMO's own: keeps logarithms of losses at their lower bound finite


class RLWConfig(WeightingConfig):
    """No settings."""

    name: Literal["rlw"] = Field("rlw", description="The weighting's name in WEIGHTINGS.")


class RLWWeighting(Weighting):
    """Weights n softmax(z), z ~ N(0, 1) drawn anew in each step; uniform where nothing is drawn from.

    Source: random loss weighting, Lin et al. 2021, arXiv:2111.10603.
    """

    Config: ClassVar[type[WeightingConfig]] = RLWConfig

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],  # noqa: ARG002  the same for every sample
        active: Bool[Tensor, " items"],
    ) -> Choice:
        z = torch.zeros(len(self.items))
        if self.training and self.generator is not None:
            z = torch.randn(len(self.items), generator=self.generator)
        p, _ = softmax_over_active(z.to(losses)[None], active)
        return Choice((p * active.sum()).expand_as(losses))


class DWAConfig(WeightingConfig):
    """How long a loss is averaged, and how sharply its rate counts."""

    name: Literal["dwa"] = Field("dwa", description="The weighting's name in WEIGHTINGS.")
    window: int = Field(50, ge=1, description="Steps over which losses are averaged; the paper takes an epoch.")
    temperature: float = Field(2.0, gt=0, description="Divides the rates of the losses.")


class DWAWeighting(Weighting):
    """Weights n softmax(r / T), r_i the ratio of a loss's last two windows' means: what falls slowly counts more.

    Uniform during the first two windows. Source: dynamic weight average, Liu et al. 2019, arXiv:1803.10704.
    """

    Config: ClassVar[type[WeightingConfig]] = DWAConfig
    total: Tensor
    last: Tensor
    rates: Tensor

    def __init__(self, config: DWAConfig, **made_for: Any) -> None:
        super().__init__(config, **made_for)
        self.config = config
        self.steps = 0
        self.register_buffer("total", torch.zeros(len(self.items)))  # of the window under way
        self.register_buffer("last", torch.zeros(len(self.items)))  # means of the window before
        self.register_buffer("rates", torch.ones(len(self.items)))

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],  # noqa: ARG002  the same for every sample
        active: Bool[Tensor, " items"],
    ) -> Choice:
        p, _ = softmax_over_active(self.rates.to(losses)[None] / self.config.temperature, active)
        weights = (p * active.sum()).expand_as(losses)
        if self.training:
            self._note(losses.mean(0))
        return Choice(weights)

    @torch.no_grad()
    def _note(self, losses: Float[Tensor, " items"]) -> None:
        self.total += losses.to(self.total)
        self.steps += 1
        if self.steps % self.config.window:
            return
        mean = self.total / self.config.window
        known = (self.last > 0) & (mean > 0)
        self.rates.copy_(torch.where(known, mean / self.last.clamp_min(_TINY), 1.0))
        self.last.copy_(mean)
        self.total.zero_()

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.steps])

    def set_extra_state(self, state: Any) -> None:
        self.steps = int(state[0])


class FAMOConfig(WeightingConfig):
    """How fast the logits move, and how they are pulled back."""

    name: Literal["famo"] = Field("famo", description="The weighting's name in WEIGHTINGS.")
    rate: float = Field(0.025, gt=0, description="Step of the logits.")
    decay: float = Field(0.001, ge=0, description="Pull of the logits towards zero, times the rate.")


class FAMOWeighting(Weighting):
    """Weights n (z_i / l_i) / Σ_j z_j / l_j, z = softmax(ξ): descent of Σ z_i log l_i, in which no loss stays behind.

    After a step ξ ← ξ - rate ((∂z/∂ξ)ᵀ (log l(t) - log l(t+1)) + decay ξ), with l(t+1) the losses of the next step.
    Departure: the paper measures them on the same batch again. Losses must be >= 0, whose lower bound is taken as 0.

    Source: Liu et al. 2023, arXiv:2306.03792.
    """

    Config: ClassVar[type[WeightingConfig]] = FAMOConfig
    logits: Tensor
    before: Tensor

    def __init__(self, config: FAMOConfig, **made_for: Any) -> None:
        super().__init__(config, **made_for)
        self.config = config
        self.register_buffer("logits", torch.zeros(len(self.items)))
        self.register_buffer("before", torch.full((len(self.items),), torch.inf))  # log losses of the last step

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],  # noqa: ARG002  the same for every sample
        active: Bool[Tensor, " items"],
    ) -> Choice:
        means = losses.mean(0) + _TINY
        if not self.training:
            return Choice(self._weights(means, active).expand_as(losses))
        with torch.no_grad():
            now = means.log().to(self.before)
            z = softmax_over_active(self.logits[None], active)[0][0]
            fall = torch.where(active & self.before.isfinite(), self.before - now, 0.0)
            self.logits -= self.config.rate * (z * (fall - (z * fall).sum()) + self.config.decay * self.logits)
            self.before.copy_(torch.where(active, now, torch.inf))
        return Choice(self._weights(means, active).expand_as(losses))

    def _weights(self, means: Float[Tensor, " items"], active: Bool[Tensor, " items"]) -> Float[Tensor, "1 items"]:
        z, _ = softmax_over_active(self.logits.to(means)[None], active)
        shares = torch.where(active, z / means, 0.0)
        return shares / shares.sum() * active.sum()


class SmallLossConfig(WeightingConfig):
    """How sharply a small loss counts, and how long its item's mean remembers."""

    name: Literal["small_loss"] = Field("small_loss", description="The weighting's name in WEIGHTINGS.")
    temperature: float = Field(1.0, gt=0, description="Of the ratio of a loss to its item's running mean.")
    decay: float = Field(0.99, ge=0, lt=1, description="Of the running means, a step.")


class SmallLossWeighting(Weighting):
    """Weights n softmax_i(-l[b,i] / (τ m_i)), m_i the running mean of an item: what is easy for a sample counts more.

    The trivial rival of a gate, and of all that only follows ease. Uniform before the first step has a mean.
    """

    Config: ClassVar[type[WeightingConfig]] = SmallLossConfig
    means: Tensor

    def __init__(self, config: SmallLossConfig, **made_for: Any) -> None:
        super().__init__(config, **made_for)
        self.config = config
        self.register_buffer("means", torch.zeros(len(self.items)))  # 0: not known yet

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],  # noqa: ARG002  losses alone are looked at
        active: Bool[Tensor, " items"],
    ) -> Choice:
        known = (self.means > 0).to(losses.dtype)
        ratios = known * losses / self.means.to(losses).clamp_min(_TINY)
        ratios = ratios + (1 - known)  # an item without a mean counts as one at its mean
        p, _ = softmax_over_active(-ratios / self.config.temperature, active)
        if self.training:
            with torch.no_grad():
                now = losses.mean(0).to(self.means)
                moved = torch.where(self.means > 0, torch.lerp(now, self.means, self.config.decay), now)
                self.means.copy_(torch.where(active, moved, self.means))
        return Choice(p * active.sum())

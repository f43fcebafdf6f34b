"""Weights that follow what each loss does for pairs that are never trained on, measured by forward derivatives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from cmapkd.weighting.base import WeightingConfig
from cmapkd.weighting.joint import JointConfig, JointWeighting

_LEAST = 1e-3  # of a weight before the floor: from here it can come back within a few measurements
_CLIP = 3.0  # standard deviations, of one sample's slope


class GradientAlignmentConfig(JointConfig):
    """How often the slopes are measured, how fast the weights follow, and what they leave alone."""

    name: Literal["gradient_alignment"] = Field("gradient_alignment", description="The weighting's name in WEIGHTINGS.")
    every: int = Field(10, ge=1, description="Steps between measurements.")
    rate: float = Field(0.1, gt=0, description="Of the weights' logarithm, a measurement; the benefits have RMS 1.")
    decay: float = Field(0.9, ge=0, lt=1, description="Of the running mean of the slopes, a measurement.")
    floor: float = Field(0.5, ge=0, lt=1, description="Share of uniform weights mixed in: no weight is below it.")
    preconditioned: bool = Field(True, description="Divide the direction by AdamW's root mean squares, as its step is.")
    derivative: Literal["forward", "difference"] = Field(
        "forward",
        description="forward: exact, in forward mode; difference: two forward passes, for models without forward mode.",
    )
    by_sample: float = Field(
        0.0, ge=0, description="Strength of weights by sample, in the steps that measure; take every: 1 then. 0: none."
    )
    agreement: float = Field(
        0.2,
        ge=-1,
        lt=1,
        description="Correlation of a sample's slopes along two halves of the pairs that by_sample asks.",
    )


class GradientAlignmentWeighting(JointWeighting):
    """Multiplicative weights of levels and terms by the slope of each along the held-out loss's descent.

    With v = P ∇L_out, the gradient of the held-out loss through AdamW's preconditioner P = 1 / (√m₂ + ε), the slope
    a_i = ⟨∇ℓ_i, v⟩ is how fast a step on item i lowers L_out. Every `every` steps a_i enters a running mean ā_i, and
        w_i ← w_i exp(rate · b_i),   b_i = (ā_i / g_i) / RMS_j(ā_j / g_j),
    with g_i the norm of item i's gradient as it counts, on the budget of gradient of every `JointWeighting`. A share of
    the budget p_i = w_i g_i gains ā_i / g_i, so this is exponentiated gradient on those shares. `floor` of uniform
    weights is mixed in.

    By sample (`by_sample` > 0): in a step that measures, the level i of sample b besides counts
    exp(by_sample · z[b,i]), z the slope standardised over the batch, scaled to a mean of 1 over the batch. It does so
    only while the slopes along two independent halves of the held-out pairs correlate by more than `agreement`.

    Departures from the audit's design: the exponent is a benefit for a unit of gradient and not the bare slope, which
    grows with an item's own scale. Items without a gradient keep weight 1.

    Raises:
        ConfigError: `fixed` names an item that is not weighed.
    Source: Ren et al. 2018, arXiv:1803.09050; Du et al. 2018, arXiv:1812.02224. The joining of the parts is ours.
    """

    Config: ClassVar[type[WeightingConfig]] = GradientAlignmentConfig
    weight: Tensor
    slopes: Tensor
    agreed: Tensor

    def __init__(self, config: GradientAlignmentConfig, *, items: Sequence[str], context_dim: int) -> None:
        super().__init__(config, items=items, context_dim=context_dim)
        self.config = config
        self.register_buffer("weight", torch.ones(len(items)))  # before budget and floor
        self.register_buffer("slopes", torch.zeros(len(items)))
        self.register_buffer("agreed", torch.zeros(()))

    @property
    def held_out_every(self) -> int | None:
        return self.config.every

    @torch.no_grad()
    def observe_slopes(self, slopes: Mapping[str, Float[Tensor, "halves batch"] | Float[Tensor, "halves one"]]) -> None:
        """Takes each active item's slopes along one direction, or along those of two halves; moves the weights.

        Args:
            slopes: of every sample for a level, one number for another term, by item.
        """
        names = [*slopes]
        means = torch.stack([each.mean() for each in slopes.values()]).to(self.slopes)
        rate = max(1 - self.config.decay, 1 / (self.measured + 1))  # plain means over the first measurements
        at = torch.tensor([self.items.index(name) for name in names], device=means.device)
        self.slopes[at] += rate * (means - self.slopes[at])
        learns = torch.tensor([name not in self.config.fixed for name in names], device=means.device)
        learns &= self.norms[at] > 0
        benefit = torch.where(learns, self.slopes[at] / self.norms[at].clamp_min(1e-30), 0.0)
        scale = (benefit.square().sum() / learns.sum().clamp_min(1)).sqrt().clamp_min(1e-30)
        moved = self.weight[at] * (self.config.rate * benefit / scale).exp()
        share = (self.norms[at] * learns).sum() / (moved * self.norms[at] * learns).sum().clamp_min(1e-30)
        self.weight[at] = torch.where(learns, (moved * share).clamp_min(_LEAST), self.weight[at])
        if self.config.by_sample:
            self._observe_samples({name: each for name, each in slopes.items() if each.shape[-1] > 1}, rate)
        self.measured += 1

    def _observe_samples(self, slopes: Mapping[str, Float[Tensor, "halves batch"]], rate: float) -> None:
        """Factors of this step for each sample and level, if both halves of the held-out pairs agree about them."""
        found = [_correlation(*each.unbind()) for each in slopes.values() if len(each) == 2]
        if not found:
            return
        self.agreed += rate * (torch.stack(found).mean().to(self.agreed) - self.agreed)
        if float(self.agreed) <= self.config.agreement:
            return
        for name, each in slopes.items():
            slope = each.mean(0)
            z = ((slope - slope.mean()) / slope.std(correction=0).clamp_min(1e-30)).clamp(-_CLIP, _CLIP)
            factor = (self.config.by_sample * z).exp()
            self.by_sample[name] = factor / factor.mean()

    def weights_of(self, active: Collection[str]) -> dict[str, float]:
        """What each active item counts: a budget of gradient shared out, floor mixed in; fixed items count 1."""
        raw, norms = (dict(zip(self.items, each, strict=True)) for each in self.on_host("weight", "norms"))
        counts = self.on_budget({item: raw[item] for item in self.items if item in active}, norms)
        floor = self.config.floor
        return {item: floor + (1 - floor) * counts[item] for item in active}


def _correlation(first: Float[Tensor, " batch"], second: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Pearson's; 0 where one of them does not vary."""
    a, b = first - first.mean(), second - second.mean()
    scale = a.norm() * b.norm()
    correlation: Tensor = torch.where(scale > 0, (a * b).sum() / scale.clamp_min(1e-30), 0.0)
    return correlation

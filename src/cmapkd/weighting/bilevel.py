"""A small network from a sample's losses to its weights, taught through one look-ahead step of the student."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from cmapkd.weighting.base import Choice, WeightingConfig
from cmapkd.weighting.joint import JointConfig, JointWeighting

_HARDEST = 3.0  # running means above its own that a loss counts as, at most
_BETAS, _EPS = (0.9, 0.999), 1e-8  # of Adam


class BilevelConfig(JointConfig):
    """How far the student looks ahead, and how the network learns."""

    name: Literal["bilevel"] = Field("bilevel", description="The weighting's name in WEIGHTINGS.")
    every: int = Field(10, ge=1, description="Steps between look-ahead steps.")
    look_ahead: float = Field(
        0.01, gt=0, description="Length of the student's look-ahead step, as a share of its parameters' own length."
    )
    rate: float = Field(0.02, gt=0, description="Of Adam on the network, a look-ahead step.")
    hidden: int = Field(32, ge=1, description="Width of the one hidden layer.")
    reach: float = Field(2.0, gt=0, description="Before the budget no weight leaves exp(-reach) to exp(reach).")
    decay: float = Field(0.99, ge=0, lt=1, description="Of the losses' running means, a step.")
    preconditioned: bool = Field(True, description="Step by AdamW's root mean squares, as the optimizer would.")
    derivative: Literal["forward", "difference"] = Field(
        "forward",
        description="forward: exact, in forward mode; difference: two forward passes, for models without forward mode.",
    )


class BilevelWeighting(JointWeighting):
    """Weights by sample and level, w[b,·] = V_φ(ℓ[b,·]), with which one step of the student lowers the held-out loss.

    The network sees each level's loss over its running mean, x[b,i] = ℓ[b,i] / m_i - 1, kept within [-1, 3], and gives
        w[b,i] ∝ exp(reach · tanh(c_i + U gelu(T x[b] + t))),
    for a whole term, which has one loss for the batch, exp(reach · tanh(c_i)). It begins with U = 0 and c = 0, that is
    uniform. Σ_i g_i mean_b w[b,i] keeps the budget of gradient of every `JointWeighting`, so weight moves between
    levels, modalities, terms and also samples.

    Every `every` steps, with P = 1 / (√m₂ + ε) of AdamW,
        θ̂(φ) = θ - α P ∇_θ Σ_i mean_b w[b,i] ℓ[b,i],   φ ← φ - Adam(∇_φ L_out(θ̂(φ))).
    Weights see their losses detached, so the gradient is exactly -α Σ_i mean_b (∂w[b,i]/∂φ) a[b,i], with
    a[b,i] = ⟨∇ℓ[b,i], P ∇L_out(θ̂)⟩ by one forward-mode pass: no second derivatives, and no graph of the step.

    Departures from Meta-Weight-Net: weights of levels beside those of samples, one network that sees a sample's losses
    of all levels, losses over their running means, a budget in place of a sum of one, α by the step's length, and the
    optimizer's preconditioner.

    Source: Shu et al. 2019, arXiv:1902.07379; for hints Jang et al. 2019, arXiv:1905.05901 and HKD, arXiv:2211.17059.
    The slopes in place of second derivatives are ours.
    """

    Config: ClassVar[type[WeightingConfig]] = BilevelConfig
    network: ClassVar[tuple[str, ...]] = ("into", "into_bias", "out", "out_bias")
    into: Tensor
    into_bias: Tensor
    out: Tensor
    out_bias: Tensor
    means: Tensor
    scale: Tensor

    def __init__(self, config: BilevelConfig, *, items: Sequence[str], context_dim: int) -> None:
        super().__init__(config, items=items, context_dim=context_dim)
        self.config = config
        count = len(items)
        self.register_buffer("into", torch.randn(config.hidden, count) / count**0.5)
        self.register_buffer("into_bias", torch.zeros(config.hidden))
        self.register_buffer("out", torch.zeros(count, config.hidden))
        self.register_buffer("out_bias", torch.zeros(count))
        for name in self.network:  # of Adam
            self.register_buffer(f"{name}_first", torch.zeros_like(getattr(self, name)))
            self.register_buffer(f"{name}_second", torch.zeros_like(getattr(self, name)))
        self.register_buffer("means", torch.zeros(count))  # of the levels' losses; 0: not known yet
        self.register_buffer("scale", torch.ones(()))  # of raw weights at the last look-ahead step

    @property
    def held_out_every(self) -> int | None:
        return self.config.every

    def weights_for(
        self, losses: Mapping[str, Tensor], network: Mapping[str, Tensor] | None = None
    ) -> dict[str, Float[Tensor, "*batch"]]:
        """What every item counts, on the budget of these very losses.

        Args:
            losses: of every sample for a level, one number for another term; only values are read.
            network: φ; none: the present one.
        """
        raw = self._raw(losses, network or self._network())
        scale = self._scale(raw)
        return {item: scale * each if self._is_free(item) else torch.ones_like(each) for item, each in raw.items()}

    def observe_look_ahead(self, losses: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> None:
        """One step of Adam on φ.

        Args:
            losses: those that the look-ahead step was made of, as `weights_for` takes them.
            slopes: a[b,i] of the same losses, of their shapes.
        """
        found = self.gradient_of_network(losses, slopes)
        self.measured += 1
        with torch.no_grad():
            for name, slope in found.items():
                parameter, first, second = (getattr(self, name + kind) for kind in ("", "_first", "_second"))
                first.lerp_(slope, 1 - _BETAS[0])
                second.lerp_(slope.square(), 1 - _BETAS[1])
                mean = first / (1 - _BETAS[0] ** self.measured)
                size = (second / (1 - _BETAS[1] ** self.measured)).sqrt()
                parameter.sub_(self.config.rate * mean / (size + _EPS))
            self.scale.copy_(self._scale(self._raw(losses, self._network())))

    def gradient_of_network(self, losses: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """∇_φ L_out(θ̂(φ)) / α, by the name of φ's parts."""
        with torch.enable_grad():
            network = {name: each.detach().clone().requires_grad_() for name, each in self._network().items()}
            weights = self.weights_for(losses, network)
            fall = torch.stack([(weights[item] * slopes[item].detach().to(weights[item])).mean() for item in slopes])
            found = torch.autograd.grad(-fall.sum(), [*network.values()], allow_unused=True, materialize_grads=True)
        return dict(zip(network, found, strict=True))

    @torch.no_grad()
    def look(self, losses: Mapping[str, Float[Tensor, " batch"]]) -> None:
        """Weighs this step's samples; in training mode the running means of their losses move afterwards."""
        raw = self._raw(losses, self._network())
        self.by_sample = {item: self.scale * each for item, each in raw.items() if self._is_free(item)}
        if self.training:
            for item, each in losses.items():
                at, now = self.items.index(item), each.detach().mean().to(self.means)
                before = self.means[at].clone()
                self.means[at] = torch.where(before > 0, torch.lerp(now, before, self.config.decay), now)

    def weights_of(self, active: Collection[str]) -> dict[str, float]:
        """Of whole terms. Levels count 1 here and by sample what `look` found, whose means may leave the budget a
        little between two look-ahead steps."""
        [[scale], bias] = self.on_host("scale", "out_bias")
        counts = {
            item: scale * math.exp(self.config.reach * math.tanh(bias[self.items.index(item)])) for item in active
        }
        return {item: counts[item] if self._is_free(item) and item not in self.by_sample else 1.0 for item in active}

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],  # noqa: ARG002  it sees the losses
        active: Bool[Tensor, " items"],
    ) -> Choice:
        """The weights of items that all have losses by sample."""
        columns = {
            item: column
            for item, column, is_active in zip(self.items, losses.unbind(-1), active.tolist(), strict=True)
            if is_active
        }
        found, none = self.weights_for(columns), torch.zeros_like(losses[:, 0])
        self.look(columns)
        return Choice(torch.stack([found.get(item, none) for item in self.items], dim=-1).to(losses))

    def _network(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.network}

    def _raw(self, losses: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights before the budget: by sample of a level, one of another term."""
        levels = {item: each.detach().to(self.means) for item, each in losses.items() if each.ndim}
        bias = network["out_bias"]
        raw = {item: bias[self.items.index(item)] for item in losses if item not in levels}
        if levels:
            none = torch.zeros_like(next(iter(levels.values())))
            seen = torch.stack(
                [self._relative(item, levels[item]) if item in levels else none for item in self.items], 1
            )
            hidden = F.gelu(F.linear(seen, network["into"], network["into_bias"]))
            logits = F.linear(hidden, network["out"], bias)
            raw |= {item: logits[:, self.items.index(item)] for item in levels}
        return {item: (self.config.reach * each.tanh()).exp() for item, each in raw.items()}

    def _relative(self, item: str, losses: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Above or below its running mean, as a share of it; 0 while that is not known."""
        mean = self.means[self.items.index(item)]
        share: Tensor = torch.where(mean > 0, losses / mean.clamp_min(1e-30) - 1, 0.0).clamp(max=_HARDEST)
        return share

    def _scale(self, raw: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """Which puts these weights on the budget."""
        free = [item for item in raw if self._is_free(item)]
        if not free:
            return torch.ones_like(self.scale)
        norms = torch.stack([self.norms[self.items.index(item)] for item in free])
        means = torch.stack([raw[item].mean() for item in free])
        return norms.sum() / (norms * means).sum()

    def _is_free(self, item: str) -> bool:
        [norms] = self.on_host("norms")
        return item not in self.fixed and norms[self.items.index(item)] > 0

"""A bandit over a few named vectors of weights, rewarded by the fall of a loss on the same held-out pairs (Exp3.S)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, field_validator
from torch import Tensor

from cmapkd.config import ConfigError, closest
from cmapkd.weighting.base import WeightingConfig
from cmapkd.weighting.joint import JointConfig, JointWeighting

_QUANTILES = 0.2, 0.8  # of the falls, which earn -1 and 1


class BanditConfig(JointConfig):
    """Between what it chooses, for how long, and how fast it learns."""

    name: Literal["bandit"] = Field("bandit", description="The weighting's name in WEIGHTINGS.")
    window: int = Field(50, ge=1, description="Steps that share one vector and earn one reward.")
    vectors: dict[str, dict[str, NonNegativeFloat]] = Field(
        default_factory=dict,
        description="What items count by the vector's name, {early: {P2: 4}}; items not named count 1. None: uniform, "
        "and for each item one that counts it `boost` times.",
    )
    boost: float = Field(4.0, gt=0, description="Of the vectors that are made where none are named.")
    rate: float = Field(0.1, gt=0, description="η: of the logits, for a reward of 1 over its probability.")
    explore: float = Field(0.2, gt=0, le=1, description="ε: share of windows in which any vector is as likely.")
    share: float = Field(0.02, ge=0, lt=1, description="α: what the others get of a vector's weight, a window.")
    history: int = Field(20, ge=2, description="Windows whose falls say what a large one is.")

    @field_validator("vectors")
    @classmethod
    def _several(cls, value: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        if len(value) == 1:
            raise ValueError(f"one vector ({next(iter(value))}) leaves nothing to choose: name at least two, or none")
        return value


class BanditWeighting(JointWeighting):
    """Exp3.S over K fixed vectors of weights, each kept for a window of steps.

    With logits s (0 at the start), π = (1 - ε) softmax(s) + ε / K draws a window's vector k. Its reward is the fall of
    the held-out loss between the window's first step and the next window's, on the same pairs both times. By the
    quantiles of the last falls it becomes r in [-1, 1]: -1 up to the 20th percentile, 1 from the 80th on. Then
        r̃_j = r 1[j = k] / π_k,   s_j ← log[(1 - α) exp(s_j + η r̃_j) + α / (K - 1) Σ_{i ≠ j} exp(s_i + η r̃_i)].
    Each vector is put on the budget of gradient of every `JointWeighting`.

    Departures: the source's α falls as 1 / t and its quantiles are of a sample of all rewards. Here α is constant and
    the quantiles are of the last windows, because the falls of a training shrink. Without named vectors they are
    uniform weights, and those with one item (that is not `fixed`) at `boost`.

    Raises:
        ConfigError: a vector names an item that is not weighed, or changes a fixed one.
        ValueError: in `observe_held_out`, no generator is given.
    Source: Graves et al. 2017, arXiv:1704.03003; Exp3.S of Auer et al. 2002.
    """

    Config: ClassVar[type[WeightingConfig]] = BanditConfig
    whole_held_out: ClassVar[bool] = True
    logits: Tensor
    falls: Tensor
    before: Tensor
    chosen: Tensor

    def __init__(self, config: BanditConfig, *, items: Sequence[str], context_dim: int) -> None:
        super().__init__(config, items=items, context_dim=context_dim)
        self.config = config
        self.vectors: dict[str, dict[str, float]] = {name: dict(each) for name, each in config.vectors.items()}
        self.vectors = self.vectors or {
            "uniform": {},
            **{item: {item: config.boost} for item in items if item not in config.fixed},
        }
        for name, vector in self.vectors.items():
            for item in vector:
                if item not in items:
                    raise ConfigError(
                        f"vectors.{name}.{item}: unknown item{closest(item, items)}; weighed here: {', '.join(items)}"
                    )
                if item in config.fixed:
                    raise ConfigError(f"vectors.{name}.{item}: the item is fixed at weight 1: name it in one of both")
        self.register_buffer("logits", torch.zeros(len(self.vectors)))
        self.register_buffer("falls", torch.full((config.history,), torch.inf))  # of the last windows
        self.register_buffer("before", torch.tensor(torch.inf))  # the held-out loss at the window's first step
        self.register_buffer("chosen", torch.zeros((), dtype=torch.int64))

    @property
    def held_out_every(self) -> int | None:
        return self.config.window

    @property
    def probabilities(self) -> Float[Tensor, " vectors"]:
        """π, of what the next window tries."""
        explore = self.config.explore
        return (1 - explore) * self.logits.softmax(0) + explore / len(self.logits)

    @torch.no_grad()
    def observe_held_out(self, loss: Float[Tensor, ""], *, generator: torch.Generator | None) -> None:
        """Rewards the window that ends, if one does, and draws the next one's vector.

        Args:
            loss: on the same pairs in each call.
            generator: on the CPU, the same in every process.
        """
        if generator is None:
            raise ValueError("a bandit draws what it tries: give it a generator, as `StepInfo` makes them")
        fall = self.before - loss.detach().to(self.before)
        if bool(fall.isfinite()):  # there was a window
            self.falls.copy_(torch.cat([self.falls[1:], fall.reshape(1)]))
            self._learn(self._reward(fall))
        self.before.copy_(loss.detach())
        drawn = torch.multinomial(self.probabilities.double().cpu(), 1, generator=generator)
        self.chosen.copy_(drawn[0])
        self.measured += 1

    def _reward(self, fall: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """In [-1, 1]: where the fall lies among the last ones; 0 while all are alike."""
        known = self.falls[self.falls.isfinite()]
        low, high = torch.quantile(known, known.new_tensor(_QUANTILES))
        reward = 2 * (fall - low) / (high - low).clamp_min(torch.finfo(known.dtype).tiny) - 1
        return torch.where(high > low, reward.clamp(-1, 1), 0.0)

    def _learn(self, reward: Float[Tensor, ""]) -> None:
        """One step of Exp3.S for the vector that was tried."""
        if len(self.logits) == 1:
            return
        moved = self.logits.clone()
        moved[self.chosen] += self.config.rate * reward / self.probabilities[self.chosen]
        odds = (moved - moved.max()).exp()
        shared = self.config.share / (len(odds) - 1) * (odds.sum() - odds)
        self.logits.copy_(((1 - self.config.share) * odds + shared).clamp_min(torch.finfo(odds.dtype).tiny).log())

    def weights_of(self, active: Collection[str]) -> dict[str, float]:
        """What this window's vector lets each active item count, on the budget; fixed items count 1.

        Raises:
            ValueError: the vector leaves nothing of what is active.
        """
        [[chosen], norms] = self.on_host("chosen", "norms")
        name, vector = [*self.vectors.items()][int(chosen)]
        raw = {item: vector.get(item, 1.0) for item in active}
        if not any(raw.values()):
            raise ValueError(f"vector {name} gives 0 to every active item ({', '.join(raw)}): leave it out")
        return self.on_budget(raw, dict(zip(self.items, norms, strict=True)))

    def log(self) -> dict[str, Tensor]:
        probabilities = dict(zip(self.vectors, self.probabilities, strict=True))
        return {f"probability/{name}": each.clone() for name, each in probabilities.items()}

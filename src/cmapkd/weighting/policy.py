"""A bandit that learns the weights from what they do to a held-out loss (REINFORCE, Williams 1992)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.weighting.base import Choice, Weighting, WeightingConfig, by_item, softmax_over_active, with_floor


class PolicyConfig(WeightingConfig):
    """How the policy explores, what it is rewarded for, and when it begins."""

    name: Literal["policy"] = Field("policy", description="The weighting's name in WEIGHTINGS.")
    warmup_steps: int = Field(500, ge=1, description="Steps of uniform weights while statistics are collected.")
    window: int = Field(20, ge=2, description="Steps that share one action and earn one reward.")
    edge: int = Field(5, ge=1, description="Held-out losses averaged at each end of a window.")
    num_features: int = Field(8, ge=1, description="Numbers that the policy sees of a sample's context.")
    std: float = Field(0.5, gt=0, description="Standard deviation of the logits that are tried.")
    baseline_decay: float = Field(0.9, ge=0, lt=1, description="Of the baseline and scale of the reward, a window.")
    entropy_weight: float = Field(0.02, ge=0, description="Of the entropy bonus, in standard deviations of reward.")
    cost_weight: float = Field(
        0.0, ge=0, description="Standard deviations of the held-out loss's decrease that one unit of cost is worth."
    )
    costs: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="Of every item by name, in one unit: share of FLOPs or of cache bytes."
    )
    floor: float = Field(0.0, ge=0, le=1, description="Share of uniform weights mixed in: no weight is below it.")

    @model_validator(mode="after")
    def _edges_fit(self) -> Self:
        if 2 * self.edge > self.window + 1:
            raise ValueError(
                f"edge {self.edge} is too long for window {self.window}: its two ends overlap; set edge to at most "
                f"{(self.window + 1) // 2}"
            )
        return self


@dataclass
class _Clock:
    """Where the policy stands: whole numbers on the CPU, so that no step waits for the device."""

    steps: int = 0  # forwards in training
    observed: int = 0  # held-out losses ever observed
    waiting: int = 0  # 1: one of them was observed since the last forward
    observations: int = 0  # of this window
    weighed: int = 0  # forwards in this window
    closed: int = 0  # windows that earned a reward
    acting: int = 0  # 1: this window tries an action
    learning: int = 0  # 1: the window before tried one, and its advantage is known
    samples: int = 0  # samples in the statistics of the context


class PolicyWeighting(Weighting):
    """Tries weights for a window of steps, and moves towards those after which a held-out loss fell faster.

    Policy. φ(x) = (1, unit(tanh(A x))) / sqrt(2) are features of a sample's context x, standardised by statistics of
    the warm-up, through a fixed random map A. A sample's logits are z = Θ φ(x) and its weights n softmax(z), with
    Θ ~ N(M, std²) drawn once for each window: z ~ N(M φ(x), std²), a logistic-normal policy of mean M φ(x).
    Credit. A window of many samples earns one number. Noise of its own for each sample would ask that number about
    thousands of independent decisions; one noise vector for all could only move every sample's weights alike. Noise on
    Θ is one decision of items x (1 + num_features) numbers that acts on each sample by its context and is constant
    over the window; its log-density needs Θ alone, no contexts of the past (exploration in the parameters, Sehnke et
    al. 2010; in the features of the state, Raffin et al. 2020, arXiv:2005.05719).
    Reward. Held-out losses o_0 .. o_W of a window of W steps; o_W is the first of the next window, measured before a
    step of it, so all W + 1 tell of this window only. decrease = mean of the first `edge` - mean of the last `edge`;
        advantage = (decrease - baseline) / scale - cost_weight (cost - its baseline),
    where baselines are running means, scale is the running root mean square of decrease - baseline (the new one
    included, so no outlier exceeds 1 / sqrt(1 - baseline_decay)), and cost = sum_i p_i cost_i, p = w / n, averaged over
    the window's samples.
    Objective. In each of the W steps after: (1 / W) [-std² advantage log N(Θ; M, std²) + entropy_weight KL(mean
    policy || uniform)]: summed over the window one natural-gradient step of REINFORCE, spread out so that M learns at
    an optimizer's ordinary rate. It reaches M only.
    Phases. The first windows, until one begins after `warmup_steps`, are uniform and give the context's statistics,
    baseline and scale. A change of the active items breaks the window off, without reward. In eval mode the mean policy
    answers, nothing is drawn or counted.

    All state is in `state_dict`, so a run goes on bit-identically, also from the middle of a window. Noise comes from
    the generator that `forward` is given in the step in which a window begins.

    Raises:
        ConfigError: `costs` does not name exactly the items, or is missing where cost_weight is not 0.
        RuntimeError: in `forward`, when nothing was observed during the whole warm-up.
        ValueError: in `forward`, when a window begins and no generator is given.
    Source: Williams 1992, REINFORCE; those above for the exploration. The joining of the parts is ours.
    """

    Config: ClassVar[type[WeightingConfig]] = PolicyConfig
    reads_held_out: ClassVar[bool] = True
    reads_context: ClassVar[bool] = True
    costs: Tensor
    projection: Tensor
    context_mean: Tensor
    context_squares: Tensor
    action: Tensor
    tried: Tensor
    advantage: Tensor
    observations: Tensor
    latest: Tensor
    spent: Tensor
    mean_cost: Tensor
    mean_decrease: Tensor
    variance: Tensor

    def __init__(self, config: PolicyConfig, *, items: Sequence[str], context_dim: int) -> None:
        super().__init__(config, items=items, context_dim=context_dim)
        if config.cost_weight and not config.costs:
            raise ConfigError(
                f"cost_weight is {config.cost_weight}, but costs is empty: give {', '.join(items)} a cost"
            )
        costs = by_item(config.costs, items, what="costs") if config.costs else [0.0] * len(items)
        self.config = config
        self.clock = _Clock()
        self.active = [1] * len(items)  # of the window under way
        shape = (len(items), 1 + config.num_features)
        self.mean = nn.Parameter(torch.zeros(shape))
        self.register_buffer("costs", torch.tensor(costs), persistent=False)
        self.register_buffer("projection", torch.randn(config.num_features, context_dim) / context_dim**0.5)
        self.register_buffer("context_mean", torch.zeros(context_dim))
        self.register_buffer("context_squares", torch.zeros(context_dim))  # summed squared distances from the mean
        self.register_buffer("action", torch.zeros(shape))  # Θ of this window
        self.register_buffer("tried", torch.zeros(shape))  # Θ of the window before
        self.register_buffer("observations", torch.zeros(config.window + 1))
        for name in ("advantage", "latest", "spent", "mean_cost", "mean_decrease", "variance"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def observe(self, held_out: Float[Tensor, ""]) -> None:
        """Takes the step's held-out loss; it is looked at in the next `forward`, where a second one would replace it.

        Raises:
            ValueError: it is not one number.
        """
        if held_out.numel() != 1:
            raise ValueError(f"held_out has shape {tuple(held_out.shape)}: give one number, the mean over its samples")
        if self.training:
            self.latest.copy_(held_out.detach().reshape(()))
            self.clock.waiting = 1
            self.clock.observed += 1

    @torch.no_grad()
    def set_active(self, active: Sequence[bool]) -> None:
        flags = [int(is_active) for is_active in active]
        if self.training and flags != self.active:  # what was observed of this window and the last no longer compares
            self.active = flags
            self.clock.observations = self.clock.learning = 0
            self._begin()

    def choose(
        self,
        losses: Float[Tensor, "batch items"],  # noqa: ARG002  it learns from held-out losses
        context: Float[Tensor, "batch context_dim"],
        active: Bool[Tensor, " items"],
    ) -> Choice:
        context = context.to(self.mean.dtype)
        if self.training:
            self._advance(context)
        features = self._features(context)
        mean_p, divergence = softmax_over_active(features @ self.mean.T, active)
        p = softmax_over_active(features @ self.action.T, active)[0] if self.training else mean_p
        weights = with_floor(p, active, self.config.floor)
        cost = weights.detach().mean(0) @ self.costs / active.sum()
        if self.training:
            self.spent += cost
            self.clock.weighed += 1
        objective = self.config.entropy_weight * divergence.mean()
        if self.clock.learning:  # -std² log N(tried; mean, std²), less its constant
            distance = (self.tried - self.mean).square().sum(-1) * active  # the noise of other items did nothing
            objective = objective + self.advantage.clone() * distance.sum() / 2
        log = {"policy/advantage": self.advantage, "policy/decrease": self.mean_decrease}
        log |= {"policy/cost": cost} if self.config.costs else {}
        return Choice(weights, objective / self.config.window, {name: value.clone() for name, value in log.items()})

    @torch.no_grad()
    def _advance(self, context: Float[Tensor, "batch context_dim"]) -> None:
        """One step of the clock: the observation that waits, the end of a window, the next action."""
        clock = self.clock
        if clock.steps >= self.config.warmup_steps and not clock.observed:
            raise RuntimeError(
                f"the policy observed no held-out loss in its {clock.steps} steps, so it has nothing to learn from: "
                "call observe(held_out) before forward in every step, or choose another weighting"
            )
        if not clock.acting:
            self._collect(context)
        if clock.waiting:
            clock.waiting = 0
            self.observations[clock.observations] = self.latest
            clock.observations += 1
        if clock.observations == self.config.window + 1:
            self._close()
        clock.steps += 1

    def _close(self) -> None:
        """Rewards the window that ended, and begins the next."""
        config, clock = self.config, self.clock
        decrease = self.observations[: config.edge].mean() - self.observations[-config.edge :].mean()
        cost = self.spent / max(1, clock.weighed)
        rate = max(1 - config.baseline_decay, 1 / (clock.closed + 1))  # plain means over the first windows
        better, dearer = decrease - self.mean_decrease, cost - self.mean_cost
        if not clock.closed:  # there is no baseline yet
            better, dearer = torch.zeros_like(better), torch.zeros_like(dearer)
        self.variance.lerp_(better.square(), rate)
        self.mean_decrease.lerp_(decrease, rate)
        self.mean_cost.lerp_(cost, rate)
        scale = self.variance.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        self.advantage.copy_(better / scale - config.cost_weight * dearer)
        self.tried.copy_(self.action)
        clock.learning = clock.acting
        clock.closed += 1
        self.observations[0] = self.observations[-1].clone()
        clock.observations = 1
        self._begin()

    def _begin(self) -> None:
        """Draws this window's action; during the warm-up it stays zero, which is uniform."""
        self.clock.weighed = 0
        self.spent.zero_()
        self.clock.acting = int(self.clock.steps >= self.config.warmup_steps)
        if self.clock.acting:
            if self.generator is None:
                raise ValueError("a policy draws what it tries: give forward a generator, as `StepInfo` makes them")
            noise = torch.randn(self.mean.shape, generator=self.generator).to(self.mean.device, non_blocking=True)
            self.action.copy_(self.mean + self.config.std * noise)

    def _collect(self, context: Tensor) -> None:
        """Adds a batch to the mean and the squared distances of the context."""
        seen, new = self.clock.samples, len(context)
        mean = context.mean(0)
        step = mean - self.context_mean
        self.context_squares += (context - mean).square().sum(0) + step.square() * (seen * new / (seen + new))
        self.context_mean += step * (new / (seen + new))
        self.clock.samples += new

    def _features(self, context: Tensor) -> Float[Tensor, "batch features"]:
        """Rows of length one: a constant, and as much again that depends on the context."""
        std = (self.context_squares / max(1, self.clock.samples)).sqrt()
        standard = (context - self.context_mean) / torch.where(std > 1e-6, std, 1.0)
        features = F.normalize((standard @ self.projection.T).tanh(), dim=-1)
        return torch.cat([torch.ones_like(features[:, :1]), features], dim=-1) / 2**0.5

    def get_extra_state(self) -> Tensor:
        """The clock and the active items of the window, as whole numbers."""
        return torch.tensor([*astuple(self.clock), *self.active])

    def set_extra_state(self, state: Any) -> None:
        numbers = [int(number) for number in state]
        count = len(fields(_Clock))
        self.clock, self.active = _Clock(*numbers[:count]), numbers[count:]

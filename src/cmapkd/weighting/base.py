"""What a weighting is: losses of several items for each sample in, their weights and one loss out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.config import Config, ConfigError, closest
from cmapkd.objectives.common import at_least_float32


class WeightingConfig(Config):
    """Base of every weighting's settings. In a recipe they stand beside the weighting's name."""

    name: str = Field("", description="The weighting's name in WEIGHTINGS.")


@dataclass(frozen=True, slots=True)
class Weighted:
    """What a weighting made of a batch.

    Attributes:
        loss: batch mean of sum_i weights[b, i] * losses[b, i], exactly that in value; its gradient reaches the losses
            and, through an objective of its own that adds nothing to the value, the weighting's parameters.
        weights: detached, >= 0; mean 1 over the active items of every sample, 0 for the others. Those of a `joint`
            weighting keep the sum of the gradients' norms instead.
        log: `entropy`, in nats, of a sample's weights as shares of one, batch mean; `weight/<item>`, batch means; and
            what the strategy adds under its own name. Detached scalars.
    """

    loss: Float[Tensor, ""]
    weights: Float[Tensor, "batch items"]
    log: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Choice:
    """What a strategy hands to its base: weights that keep the contract, and what trains the strategy itself."""

    weights: Float[Tensor, "batch items"]
    objective: Float[Tensor, ""] | None = None
    log: dict[str, Tensor] = field(default_factory=dict)


class Weighting(nn.Module, ABC):
    """Says how much each item (a level, a term) counts for each sample.

    Weights multiply the losses detached, and a strategy learns through an objective of its own on detached inputs: so
    the gradient of the loss with respect to losses[b, i] is weights[b, i] / batch for every strategy, uniform weights
    are 1, and swapping strategies changes neither the scale of the loss nor what reaches the student besides weights.

    In distributed training every process must pass the losses, contexts and held-out losses of the whole batch.

    Args:
        items: their names, in the order of the losses' columns.
        context_dim: width of what describes a sample.
    Raises:
        ValueError: there are no items, two of the same name, or no context.
    """

    Config: ClassVar[type[WeightingConfig]]
    reads_held_out: ClassVar[bool] = False
    """Whether it learns from the held-out losses of `observe`; for other strategies none need be computed."""
    reads_gradients: ClassVar[bool] = False
    """Whether it learns from the norms of `observe_gradients`, which only whole terms of a loss have."""
    reads_context: ClassVar[bool] = False
    """Whether the weights depend on what describes a sample, whatever that is."""
    reads_levels: ClassVar[bool] = False
    """Whether a sample's context is its items' own vectors, one after the other, which only levels have.

    Such a weighting is made with `widths`, of these vectors, in place of `context_dim`."""
    joint: ClassVar[bool] = False
    """Whether one weighting weighs the levels of all terms and the other terms together."""
    whole_held_out: ClassVar[bool] = False
    """Whether it reads all held-out pairs each time, the same ones, in place of as many as a batch has."""

    def __init__(
        self,
        config: WeightingConfig,  # noqa: ARG002  kept by the strategies, each with its own type
        *,
        items: Sequence[str],
        context_dim: int,
    ) -> None:
        super().__init__()
        if not items or len(set(items)) != len(items) or context_dim < 1:
            raise ValueError(
                f"a weighting needs items of different names and a context, got {list(items)} and a context of width "
                f"{context_dim}: name each level or term once"
            )
        self.items = tuple(items)
        self.context_dim = context_dim
        self.generator: torch.Generator | None = None  # of the step, during `forward`

    @abstractmethod
    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],
        active: Bool[Tensor, " items"],
    ) -> Choice:
        """Weights for the batch. Both inputs come detached, in float32 or wider, with autocast off.

        Losses of items that are not active are 0; such an item must get weight 0, the others mean 1.
        """

    def set_active(self, active: Sequence[bool]) -> None:
        """Called before `choose` with the items that are active, on the host: looking at them waits for no device."""

    def forward(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],
        active: Bool[Tensor, " items"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Weighted:
        """Weighs the losses of a batch; in training mode, once for each step.

        Args:
            losses: of every sample and item, >= 0; any floating type.
            context: describes each sample, the teacher's global features for example; no gradient reaches it.
            active: items that count at all, for stages that switch levels off; best kept on the CPU, where looking at
                it does not wait for the device. None: all. The losses of the others are not read.
            generator: where a strategy that draws takes its numbers from, on the CPU, the same in every process. It is
                `self.generator` for `set_active` and `choose`.
        Raises:
            ValueError: a shape does not fit, or nothing is active.
        """
        self._check(losses, context, active)
        everything = torch.ones(len(self.items), dtype=torch.bool, device=losses.device)
        mask = everything if active is None else active.to(losses.device, non_blocking=True)
        losses = at_least_float32(losses).masked_fill(~mask, 0.0)
        self.generator = generator
        self.set_active([True] * len(self.items) if active is None else active.tolist())
        with torch.autocast(losses.device.type, enabled=False):
            choice = self.choose(losses.detach(), at_least_float32(context.detach()), mask)
        self.generator = None
        weights = choice.weights.detach()
        loss = (weights * losses).sum(-1).mean()
        if choice.objective is not None:
            loss = loss + (choice.objective - choice.objective.detach())
        log = {"entropy": torch.special.entr(weights / mask.sum()).sum(-1).mean()}
        log |= {f"weight/{item}": mean for item, mean in zip(self.items, weights.mean(0), strict=True)}
        return Weighted(loss, weights, log | {name: value.detach() for name, value in choice.log.items()})

    def observe(self, held_out: Float[Tensor, ""]) -> None:
        """Called once for each training step, before its `forward`, with a loss on samples not yet trained on.

        The loss of the step's own fresh batch serves, as it is measured before the step that uses it; it must not
        depend on the weights. Only strategies with `reads_held_out` use it.
        """

    @property
    def held_out_every(self) -> int | None:
        """In how many steps it reads a loss on held-out pairs once; None: never."""
        return 1 if self.reads_held_out else None

    @property
    def wants_gradients(self) -> bool:
        """Whether `observe_gradients` is to be called in this step."""
        return False

    def observe_gradients(
        self, losses: Float[Tensor, " items"], norms: Float[Tensor, " items"], active: Bool[Tensor, " items"]
    ) -> None:
        """Called before `forward` if `wants_gradients`, with each item's loss and gradient norm at a shared layer.

        Both are of the whole batch over all processes; 0 for items that are not active.
        """

    def _check(self, losses: Tensor, context: Tensor, active: Tensor | None) -> None:
        num_items = len(self.items)
        if losses.ndim != 2 or losses.shape[1] != num_items:
            raise ValueError(
                f"losses has shape {tuple(losses.shape)}, but {num_items} items are weighed for each sample "
                f"({', '.join(self.items)}): give [batch, {num_items}], not means over the batch"
            )
        if context.shape != (len(losses), self.context_dim):
            raise ValueError(
                f"context has shape {tuple(context.shape)}, expected {(len(losses), self.context_dim)}: one row of the "
                "width this weighting was built for, for each row of losses"
            )
        if active is None:
            return
        if active.shape != (num_items,) or active.dtype != torch.bool:
            raise ValueError(
                f"active has shape {tuple(active.shape)} and type {active.dtype}: give one bool for each of "
                f"{', '.join(self.items)}"
            )
        if not bool(active.any()):
            raise ValueError("active switches every item off: leave out the term instead, or keep one item")


def softmax_over_active(
    logits: Float[Tensor, "batch items"], active: Bool[Tensor, " items"]
) -> tuple[Float[Tensor, "batch items"], Float[Tensor, " batch"]]:
    """Softmax over the active items, and its KL divergence from uniform over them, in nats, >= 0."""
    log_p = logits.masked_fill(~active, -torch.inf).log_softmax(-1)
    p = log_p.exp()
    return p, (p * log_p.masked_fill(~active, 0.0)).sum(-1) + active.sum().log()


def with_floor(
    p: Float[Tensor, "batch items"], active: Bool[Tensor, " items"], floor: float
) -> Float[Tensor, "batch items"]:
    """Probabilities as weights of mean 1 over the active items, none of which falls below `floor`."""
    return (1 - floor) * p * active.sum() + floor * active


def by_item(values: Mapping[str, float], items: Sequence[str], *, what: str) -> list[float]:
    """`values` in the order of `items`.

    Raises:
        ConfigError: a name is unknown or missing. Lists each, unknown ones with the nearest.
    """
    problems = [f"{what}.{name}: unknown item{closest(name, items)}" for name in values if name not in items]
    problems += [f"{what}.{item}: required, but not given" for item in items if item not in values]
    if problems:
        lines = "\n  ".join(problems)
        raise ConfigError(f"{what} must name each of {', '.join(items)} once:\n  {lines}", tuple(problems))
    return [values[item] for item in items]

"""What weightings of all levels and terms together share: they learn from held-out pairs and keep a gradient budget."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from cmapkd.config import ConfigError, closest
from cmapkd.weighting.base import Choice, Weighting, WeightingConfig


class JointConfig(WeightingConfig):
    """What the budget is measured by, and what is left alone."""

    norms_every: int = Field(10, ge=1, description="Measurements between those of the gradients' norms.")
    fixed: tuple[str, ...] = Field((), description="Items that keep weight 1, as the task's own loss may.")


class JointWeighting(Weighting):
    """One weighting for the levels of all terms and the other terms, which a loss on held-out pairs teaches.

    Weights are scaled to Σ w_i g_i = Σ g_i, with g_i the norm of item i's gradient at the student as it counts. So they
    share out a budget of gradient and not of numbers: weight moves between levels of both modalities and whole terms,
    while the loss does not become stronger or weaker. Items without a gradient and `fixed` ones keep weight 1.

    What it learns from is measured by the method every `held_out_every` steps, before the step's own terms.

    Raises:
        ConfigError: `fixed` names an item that is not weighed.
    """

    joint: ClassVar[bool] = True
    norms: Tensor

    def __init__(self, config: JointConfig, *, items: Sequence[str], context_dim: int) -> None:
        super().__init__(config, items=items, context_dim=context_dim)
        for item in config.fixed:
            if item not in items:
                raise ConfigError(f"fixed: unknown item {item!r}{closest(item, items)}; weighed: {', '.join(items)}")
        self.fixed, self.norms_every = config.fixed, config.norms_every
        self.measured = 0
        self.by_sample: dict[str, Float[Tensor, " batch"]] = {}  # factors of this step
        self._read: dict[str, tuple[object, list[float]]] = {}
        self.register_buffer("norms", torch.ones(len(items)))

    @property
    def wants_norms(self) -> bool:
        """Whether `observe_norms` is to be called before the next measurement; at the first, a bank was empty."""
        return self.measured == 1 or self.measured % self.norms_every == 0

    @torch.no_grad()
    def observe_norms(self, norms: Mapping[str, float]) -> None:
        """Takes the norm of each active item's gradient at the student, of the mean over all samples."""
        for item, norm in norms.items():
            self.norms[self.items.index(item)] = norm

    @abstractmethod
    def weights_of(self, active: Collection[str]) -> dict[str, float]:
        """What each active item counts: a budget of gradient shared out; fixed items count 1."""

    def look(self, losses: Mapping[str, Float[Tensor, " batch"]]) -> None:
        """Called in each step with every level's losses of all samples, before any is weighed."""

    def log(self) -> dict[str, Tensor]:
        """What is worth logging besides the weights; detached scalars."""
        return {}

    def on_budget(self, raw: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, float]:
        """Weights scaled to the budget of these items, but for those that keep weight 1.

        Args:
            norms: of the same items.
        """
        free = {item: (raw[item], norms[item]) for item in raw if item not in self.fixed and norms[item] > 0}
        budget, spent = sum(g for _, g in free.values()), sum(w * g for w, g in free.values())
        scale = budget / spent if spent else 1.0
        return {item: scale * free[item][0] if item in free else 1.0 for item in raw}

    def on_host(self, *names: str) -> list[list[float]]:
        """Buffers as numbers, read from the device once after each change."""
        found = []
        for name in names:
            tensor = getattr(self, name)
            version = id(tensor), tensor._version
            if name not in self._read or self._read[name][0] != version:
                self._read[name] = version, tensor.reshape(-1).tolist()
            found.append(self._read[name][1])
        return found

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],  # noqa: ARG002  held-out pairs teach it
        active: Bool[Tensor, " items"],
    ) -> Choice:
        """The weights of the active items, the same for every sample: their weighted gradients keep their sum."""
        known = self.weights_of(
            [item for item, is_active in zip(self.items, active.tolist(), strict=True) if is_active]
        )
        weights = losses.new_tensor([known.get(item, 0.0) for item in self.items])
        return Choice(weights.expand_as(losses))

    def get_extra_state(self) -> Tensor:
        """How many measurements were taken."""
        return torch.tensor([self.measured])

    def set_extra_state(self, state: Any) -> None:
        self.measured = int(state[0])

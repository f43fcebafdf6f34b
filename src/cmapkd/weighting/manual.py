"""Fixed numbers, one for each item by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeFloat, field_validator
from torch import Tensor

from cmapkd.weighting.base import Choice, Weighting, WeightingConfig, by_item


class ManualConfig(WeightingConfig):
    """The numbers; only their ratios matter."""

    name: Literal["manual"] = Field("manual", description="The weighting's name in WEIGHTINGS.")
    weights: dict[str, NonNegativeFloat] = Field(
        description="A number >= 0 for every item by name, no unit; scaled to mean 1 over the active items."
    )

    @field_validator("weights")
    @classmethod
    def _not_all_zero(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weights.values()):
            raise ValueError(f"every weight is zero ({weights}): give one item more than 0, or leave the term out")
        return weights


class ManualWeighting(Weighting):
    """The same fixed weights for every sample.

    Raises:
        ConfigError: the numbers do not name exactly the items.
        ValueError: in `forward`, every active item has weight zero.
    """

    Config: ClassVar[type[WeightingConfig]] = ManualConfig
    numbers: Tensor

    def __init__(self, config: ManualConfig, *, items: Sequence[str], context_dim: int) -> None:
        super().__init__(config, items=items, context_dim=context_dim)
        self.register_buffer("numbers", torch.tensor(by_item(config.weights, items, what="weights")), persistent=False)
        self.config = config

    def set_active(self, active: Sequence[bool]) -> None:
        names = [item for item, is_active in zip(self.items, active, strict=True) if is_active]
        if not any(self.config.weights[item] for item in names):
            raise ValueError(
                f"weights gives 0 to every active item ({', '.join(names)}), so the loss would vanish: raise one of "
                "them, or switch on an item that has a weight"
            )

    def choose(
        self,
        losses: Float[Tensor, "batch items"],
        context: Float[Tensor, "batch context_dim"],  # noqa: ARG002  the same for every sample
        active: Bool[Tensor, " items"],
    ) -> Choice:
        numbers = self.numbers.to(losses.dtype) * active
        return Choice((numbers * (active.sum() / numbers.sum())).expand_as(losses))

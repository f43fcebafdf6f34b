"""`ImageTower`: what an image tower, as a part of a model, looks like to the rest of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.models.errors import first_line
from cmapkd.models.images import ImageSpec
from cmapkd.models.part_tower import PartTower
from cmapkd.models.types import LAST, LevelInfo, TowerFeatures


class ImageTower(PartTower, ABC):
    """Pixels to pooled features [batch width], not projected, and levels.

    Attributes:
        width: of the pooled features.
        spec: the tower's own resize and normalisation.
        levels: shallow to deep.
        random: whether it was just built with random weights.
    """

    random: bool = False
    width: int
    spec: ImageSpec

    @abstractmethod
    def forward(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        """Pooled features and the named levels. With `LAST` among them nothing is pooled: the features have width 0.

        Raises:
            ConfigError: the tower has no last tokens.
        """

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """See `DualEncoder.image_blocks`."""
        return ()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain data from which `rebuild` makes the untrained tower."""

    def save_config(self, folder: Path) -> None:
        """Writes what `describe` cannot hold into a model folder."""

    @torch.no_grad()
    def last_levels(self) -> tuple[LevelInfo, ...]:
        """Width and layout of the last tokens, found by a run on an empty picture.

        Raises:
            ConfigError: the tower gives none.
        """
        size = self.spec.size
        last = self.eval()(torch.zeros(1, 3, size, size), (LAST,)).levels[LAST]
        return (LevelInfo(LAST, int(last.values.shape[1 if last.layout == "map" else 2]), last.layout),)

    def example(self) -> Tensor:
        size = self.spec.size
        return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    def below(self) -> nn.Module:
        raise LookupError(self.name)

    def above(self, stored: TowerFeatures, levels: Sequence[str]) -> TowerFeatures:  # noqa: ARG002
        raise LookupError(self.name)

    @torch.no_grad()
    def measure_width(self) -> int:
        """The width of the features, found by a run on an empty picture; refuses a size that does not fit.

        Raises:
            ConfigError: the tower cannot take pictures of its size, or returns no vectors.
        """
        size = self.spec.size
        try:
            pooled = self.eval()(torch.zeros(1, 3, size, size)).embedding
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"{self.name} does not take pictures of {size} pixels: {first_line(error)}. Set image_size to one that "
                "it takes."
            ) from None
        if pooled.dim() != 2:
            raise ConfigError(
                f"{self.name} gives features of shape {tuple(pooled.shape[1:])} for a picture and not one vector: "
                "choose a pooling"
            )
        return int(pooled.shape[1])

"""What is frozen of an image tower that is entered in the middle, as a module of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.models.image_tower import ImageTower
from cmapkd.models.open_clip_levels import grid_of
from cmapkd.models.types import MIDDLE, Level, TowerFeatures


class ImagesBelow(nn.Module):
    """See `PartTower.below`.

    Args:
        half: as `middle.trunk_below`, `visual_below` or `encoder_below` makes it.
        tower: that it is a half of; its description is kept, and none of its other modules.
    """

    def __init__(self, half: Any, tower: ImageTower) -> None:
        super().__init__()
        self.lower: Any = half
        self.frozen_blocks, self._describe = tower.frozen_blocks, tower.describe()
        self.layout = tower.levels[tower.frozen_blocks - 1].layout
        self.grid: tuple[int, int] | None = getattr(tower, "grid", None)  # of transformers' ViTs

    def forward(self, images: Float[Tensor, "batch 3 height width"], _levels: Sequence[str] = ()) -> TowerFeatures:
        lower = self.lower.eval()
        if self.grid is not None:
            values: Tensor = lower(pixel_values=images).last_hidden_state
        elif hasattr(lower, "forward_features"):
            values = lower.forward_features(images)
        else:
            values = lower.transformer(lower._embeds(images))
        nothing = values.new_empty(len(values), 0)
        if self.layout == "map":
            return TowerFeatures(nothing, {MIDDLE: Level(values, "map", grid=(values.shape[-2], values.shape[-1]))})
        grid = self.grid or grid_of(lower, images)
        return TowerFeatures(nothing, {MIDDLE: Level(values, "tokens", values.shape[1] - grid[0] * grid[1], grid)})

    def describe(self) -> dict[str, Any]:
        return {**self._describe, "frozen_blocks": self.frozen_blocks}


def like_middle(middle: Level, values: Tensor) -> Level:
    """What a block behind the middle returned, as a level."""
    if middle.layout == "map":
        return Level(values, "map", grid=(values.shape[-2], values.shape[-1]))
    return Level(values, "tokens", middle.num_prefix, middle.grid)

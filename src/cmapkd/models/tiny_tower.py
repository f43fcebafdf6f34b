"""The image tower of a `tiny` model as a part of another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.models.image_tower import ImageTower
from cmapkd.models.tiny import TinyDualEncoder, TinyOptions, VisionTower, image_spec_of
from cmapkd.models.types import LAST, LevelInfo, TowerFeatures


class TinyImageTower(ImageTower):
    """`tiny`'s image tower with its projection: the pooled features are its embeddings. Levels are `blocks.N`."""

    def __init__(self, visual: VisionTower, options: TinyOptions, *, name: str) -> None:
        super().__init__()
        self.visual, self.options, self.name = visual, options, name
        self.spec = image_spec_of(options)
        self.levels = tuple(
            LevelInfo(f"blocks.{number}", options.vision_width, "tokens") for number in range(options.vision_depth)
        )
        self.width = options.embed_dim

    @classmethod
    def of(cls, model: TinyDualEncoder, name: str) -> TinyImageTower:
        """The image tower of a whole model, whose text tower is let go."""
        tower = cls(model.vision, model.options, name=name)
        tower.random = "image" in model.random_towers
        return tower

    @classmethod
    def rebuilt(cls, description: Mapping[str, Any], folder: Path) -> TinyImageTower:
        """The untrained tower that `describe` described."""
        # how many words the model had that it was taken from says nothing of the tower
        plain = {key: value for key, value in description["options"].items() if key != "vocab_size"}
        options = TinyOptions.from_mapping(plain, where=f"image tower of {folder}")
        return cls(VisionTower(options), options, name=str(description["name"]))

    def forward(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        if LAST not in levels:
            output: TowerFeatures = self.visual(images, levels)
            return output
        deepest = self.levels[-1].name
        found = self.visual(images, (*levels, deepest)).levels
        kept = {level: found[deepest if level == LAST else level] for level in levels}
        return TowerFeatures(images.new_empty(images.shape[0], 0), kept)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.visual.blocks)

    def describe(self) -> dict[str, Any]:
        return {"kind": "tiny", "name": self.name, "options": self.options.model_dump(exclude_none=True)}

"""The image tower of a `tiny:` model as a part of another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.models import tiny_family
from cmapkd.models.config import ModelConfig
from cmapkd.models.image_towers import ImagePartConfig, ImageTower
from cmapkd.models.images import ImageSpec
from cmapkd.models.storage import load_weights, read_weights
from cmapkd.models.tiny import TinyDualEncoder, TinyOptions, VisionTower
from cmapkd.models.types import LevelInfo, TowerFeatures

_CAPTIONS = ("a picture",) * 9  # for the words of a text tower that is dropped at once


class TinyImageTower(ImageTower):
    """Its pooled features are the projected class token."""

    def __init__(self, vision: VisionTower, *, options: TinyOptions, spec: ImageSpec, name: str) -> None:
        super().__init__()
        self.vision, self.options, self.spec, self.name = vision, options, spec, name
        self.levels = tuple(
            LevelInfo(f"blocks.{number}", options.vision_width, "tokens") for number in range(len(vision.blocks))
        )
        self.width = options.embed_dim

    def forward(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        found: TowerFeatures = self.vision(images, levels)
        return found

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.vision.blocks)

    def describe(self) -> dict[str, Any]:
        return {"kind": "tiny", "name": self.name, "options": self.options.model_dump(mode="json", exclude_none=True)}


def build_tiny_tower(rest: str, config: ImagePartConfig) -> TinyImageTower:
    """A preset's tower with random weights, or that of a packaged trained model."""
    options = {} if config.image_size is None else {"image_size": config.image_size}
    model: Any = tiny_family.build(rest, ModelConfig(name=config.name, init=config.init, options=options), _CAPTIONS)
    tower = TinyImageTower(model.vision, options=model.options, spec=model.image_spec, name=config.name)
    if config.checkpoint is not None:
        load_weights(tower.vision, read_weights(config.checkpoint), where=config.checkpoint)
    tower.random = config.checkpoint is None and "image" in model.random_towers
    return tower


def rebuild_tiny_tower(description: Mapping[str, Any]) -> TinyImageTower:
    """The untrained tower that `TinyImageTower.describe` described."""
    name = str(description["name"])
    options = TinyOptions.from_mapping(description["options"], where=name)
    return TinyImageTower(VisionTower(options), options=options, spec=TinyDualEncoder.spec_of(options), name=name)

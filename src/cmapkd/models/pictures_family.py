"""Names after `pictures:`: an image tower alone, as a further teacher of methods that read pictures of it only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.config import Config, ConfigError
from cmapkd.data.types import TokenBatch
from cmapkd.models.architecture import settings_text
from cmapkd.models.base import DualEncoder
from cmapkd.models.config import ModelConfig
from cmapkd.models.families import Loader
from cmapkd.models.image_tower import ImageTower
from cmapkd.models.image_towers import ImagePartConfig, build_image_tower, rebuild_image_tower
from cmapkd.models.no_texts import NoTexts
from cmapkd.models.parts import split_by_name
from cmapkd.models.storage import WEIGHTS, load_weights, read_weights, write_model_folder
from cmapkd.models.types import Tower, TowerFeatures


class PicturesOptions(Config):
    """Settings of the image tower; its sizes are in its name."""

    checkpoint: Path | None = Field(
        None, description="Weight file of this tower, with its library's names; a classifier in it is left out."
    )
    image_size: int | None = Field(None, ge=16, description="Height and width of the input, in pixels. None: its own.")
    pooling: Literal["avg", "token", "map", "max", "mean", "class", "pooler"] | None = Field(
        None, description="timm: avg, max, token, map; transformers: mean, class, pooler. None: the tower's own way."
    )


class PictureTower(DualEncoder):
    """An image tower whose embeddings are its pooled features. Embeddings of texts have width 0."""

    towers: tuple[Tower, ...] = ("image",)

    def __init__(self, image: ImageTower, *, name: str) -> None:
        super().__init__()
        self.image = image
        self.nothing = nn.Parameter(torch.zeros(()), requires_grad=False)  # of a scale: nobody compares it with texts
        self.name, self.embed_dim = name, image.width
        self.image_spec, self.tokenizer = image.spec, NoTexts()
        self.image_levels, self.text_levels = image.levels, ()

    @property
    def architecture(self) -> str:
        return settings_text(self, self.image.describe())

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self.nothing

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        prefixes = {"image": ("image",), "text": (), "projections": (), "scale": ("nothing",)}
        return split_by_name((name for name, _ in self.named_parameters()), prefixes)

    @property
    def image_blocks(self) -> tuple[nn.Module, ...]:
        return self.image.blocks

    def encode_image(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("image", levels)
        tower: TowerFeatures = self.image(images, levels)
        return tower

    def encode_text(self, texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        self.check_levels("text", levels)
        return TowerFeatures(self.nothing.new_empty(len(texts.ids), 0))

    def write(self, folder: Path) -> None:
        options = {"image": self.image.describe()}
        write_model_folder(folder, family="pictures", name=self.name, options=options, weights=self.state_dict())
        self.image.save_config(folder)


def build(rest: str, config: ModelConfig, captions: Iterable[str] | None) -> DualEncoder:  # noqa: ARG001
    """`pictures:` and the name of an image part: timm:NAME[/pretrained], open_clip:NAME[/TAG], hf:NAME, tiny:NAME."""
    options = PicturesOptions.from_mapping(config.options, where=f"options of {config.name}")
    try:
        tower = build_image_tower(ImagePartConfig(name=rest, init=config.init, **options.model_dump()))
    except ConfigError as error:
        raise ConfigError(f"{config.name}: {error}") from None
    model = PictureTower(tower, name=config.name)
    model.random_towers = ("image",) if tower.random else ()
    return model


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> DualEncoder:  # noqa: ARG001
    """A folder that `PictureTower.save` wrote; needs no network."""
    model = PictureTower(rebuild_image_tower(description["options"]["image"], folder), name=str(description["name"]))
    load_weights(model, read_weights(folder / WEIGHTS), where=folder)
    return model

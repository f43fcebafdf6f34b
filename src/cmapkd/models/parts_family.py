"""Names after `parts:`: an image tower and a text encoder that the options name, joined by heads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from cmapkd.config import Config, ConfigError
from cmapkd.models import parts_folder
from cmapkd.models.base import DualEncoder
from cmapkd.models.config import ModelConfig
from cmapkd.models.families import Loader
from cmapkd.models.heads import HeadConfig
from cmapkd.models.image_towers import ImagePartConfig, build_image_tower
from cmapkd.models.part_tower import PartTower
from cmapkd.models.parts_model import PartsModel
from cmapkd.models.several_towers import SeveralTowers, rebuild_several
from cmapkd.models.storage import load_weights
from cmapkd.models.text_towers import TextPartConfig, build_text_tower, rebuild_text_tower
from cmapkd.models.types import Tower

AnyTower = TypeVar("AnyTower", bound=PartTower)


class Freezing(Config):
    """How much of a part learns, where `training.train_parts` lets it learn at all."""

    frozen: bool = Field(False, description="Whether nothing of this tower learns.")
    frozen_blocks: int | None = Field(
        None,
        ge=1,
        description="How many of its first blocks never learn, with what stands before them. A cache stores what the "
        "last of them returns. None: no block is frozen alone.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.frozen and self.frozen_blocks is not None:
            raise ValueError(
                f"frozen: true says that nothing of {getattr(self, 'name', 'the tower')} learns, and frozen_blocks: "
                f"{self.frozen_blocks} that blocks behind these do: give one of the two"
            )
        return self


class ImageOfParts(Freezing, ImagePartConfig):
    """An image tower by name, and how much of it learns."""


class TextOfParts(Freezing, TextPartConfig):
    """A text encoder by name, and how much of it learns."""


def _one_alone(schema: dict[str, Any]) -> None:
    """In the settings' index the section of one tower, so that messages name its keys; the class itself takes lists."""
    items = schema.pop("items")
    schema.clear()
    schema.update(items)


class PartsOptions(Config):
    """The two towers, the heads behind them, and the width where they meet."""

    image: tuple[ImageOfParts, ...] = Field(
        description="The image tower: a name, or a name with its settings; or a list of several, whose pooled features "
        "are joined.",
        json_schema_extra=_one_alone,
    )
    text: TextOfParts = Field(description="The text encoder: a name, or a name with its settings.")
    image_head: HeadConfig = Field(
        default_factory=HeadConfig, description="From the image tower: linear, mlp or reader."
    )
    text_head: HeadConfig = Field(
        default_factory=HeadConfig, description="From the text encoder: linear, mlp or reader."
    )
    embed_dim: int = Field(512, ge=1, description="Width of the joint space.")
    init_logit_bias: float | None = Field(
        None, description="Start of a learned logit bias, for a sigmoid loss (SigLIP: -10). None: the model has none."
    )

    @field_validator("image", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and not value:
            raise ValueError("name at least one image tower")
        return value if isinstance(value, list | tuple) else (value,)


def build(rest: str, config: ModelConfig, captions: Iterable[str] | None) -> DualEncoder:  # noqa: ARG001
    """`parts:WORD`, where the word is a name of the user's own; `init: scratch` leaves both towers untrained."""
    if not {"image", "text"} <= config.options.keys():
        raise ConfigError(
            f"{config.name} is made of parts: name them as options.image and options.text, for example "
            "image: timm:resnet18/pretrained, text: hf:sentence-transformers/all-MiniLM-L6-v2"
        )
    options = PartsOptions.from_mapping(config.options, where=f"options of {config.name}")
    image, text = options.image, options.text
    if config.init == "scratch":
        image = tuple(each.model_copy(update={"init": "scratch"}) for each in image)
        text = text.model_copy(update={"init": "scratch"})
    towers = [_frozen(build_image_tower(each), each) for each in image]
    model = PartsModel(
        towers[0] if len(towers) == 1 else SeveralTowers(towers),
        _frozen(build_text_tower(text), text),
        image_head=options.image_head,
        text_head=options.text_head,
        embed_dim=options.embed_dim,
        bias=options.init_logit_bias,
        name=config.name,
    )
    random: dict[Tower, bool] = {"image": model.image.random, "text": model.text.random}
    model.random_towers = tuple(tower for tower, untrained in random.items() if untrained)
    return model


def _frozen(tower: AnyTower, config: Freezing) -> AnyTower:
    """The tower, with nothing in it that the config says does not learn."""
    if config.frozen or config.frozen_blocks is not None:
        tower.freeze(config.frozen_blocks)
    return tower


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> DualEncoder:  # noqa: ARG001
    """A folder that `PartsModel.save` wrote; needs no network."""
    options = description["options"]
    model = PartsModel(
        rebuild_several(options["image"], folder),
        rebuild_text_tower(options["text"], folder),
        image_head=HeadConfig.from_mapping(options["image_head"], where=str(folder)),
        text_head=HeadConfig.from_mapping(options["text_head"], where=str(folder)),
        embed_dim=int(options["embed_dim"]),
        bias=0.0 if options["bias"] else None,
        name=str(description["name"]),
    )
    load_weights(model, parts_folder.read(model, folder, form=str(options["form"])), where=folder)
    return model

"""Names after `parts:`: an image tower and a text encoder that the options name, joined by heads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from cmapkd.config import Config, ConfigError
from cmapkd.models import parts_folder
from cmapkd.models.base import DualEncoder
from cmapkd.models.config import ModelConfig
from cmapkd.models.families import Loader
from cmapkd.models.heads import HeadConfig
from cmapkd.models.image_towers import ImagePartConfig, build_image_tower, rebuild_image_tower
from cmapkd.models.parts_model import PartsModel
from cmapkd.models.storage import load_weights
from cmapkd.models.text_towers import TextPartConfig, build_text_tower, rebuild_text_tower
from cmapkd.models.types import Tower


class PartsOptions(Config):
    """The two towers, the heads behind them, and the width where they meet."""

    image: ImagePartConfig = Field(description="The image tower: a name, or a name with its settings.")
    text: TextPartConfig = Field(description="The text encoder, likewise.")
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
        image, text = image.model_copy(update={"init": "scratch"}), text.model_copy(update={"init": "scratch"})
    model = PartsModel(
        build_image_tower(image),
        build_text_tower(text),
        image_head=options.image_head,
        text_head=options.text_head,
        embed_dim=options.embed_dim,
        bias=options.init_logit_bias,
        name=config.name,
    )
    random: dict[Tower, bool] = {"image": model.image.random, "text": model.text.random}
    model.random_towers = tuple(tower for tower, untrained in random.items() if untrained)
    return model


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> DualEncoder:  # noqa: ARG001
    """A folder that `PartsModel.save` wrote; needs no network."""
    options = description["options"]
    model = PartsModel(
        rebuild_image_tower(options["image"], folder),
        rebuild_text_tower(options["text"], folder),
        image_head=HeadConfig.from_mapping(options["image_head"], where=str(folder)),
        text_head=HeadConfig.from_mapping(options["text_head"], where=str(folder)),
        embed_dim=int(options["embed_dim"]),
        bias=0.0 if options["bias"] else None,
        name=str(description["name"]),
    )
    load_weights(model, parts_folder.read(model, folder, form=str(options["form"])), where=folder)
    return model

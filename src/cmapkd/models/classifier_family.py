"""Names after `classifier:`: an image tower by its own name, which a method gives classes and heads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from cmapkd.config import Config
from cmapkd.models.classifier import AnswerRule, ClassHeadConfig, Classifier
from cmapkd.models.config import ModelConfig
from cmapkd.models.families import Loader
from cmapkd.models.image_towers import ImagePartConfig, build_image_tower, rebuild_image_tower
from cmapkd.models.storage import WEIGHTS, load_weights, read_weights


class ClassifierOptions(Config):
    """Settings of the image tower, as of one that is a part of a model."""

    checkpoint: Path | None = Field(
        None, description="Weight file of the tower, with its library's names; a classifier in it is left out."
    )
    image_size: int | None = Field(None, ge=16, description="Height and width of the input, in pixels. None: its own.")
    pooling: str | None = Field(
        None, description="timm: avg, max, token, map; transformers: mean, class, pooler. None: the tower's own way."
    )


def build(rest: str, config: ModelConfig, captions: Iterable[str] | None) -> Classifier:  # noqa: ARG001
    """`classifier:timm:resnet18/pretrained`, or another image part after the colon; without heads yet.

    Raises:
        ConfigError: the tower's name or an option is not one that can be had.
    """
    where = f"options of {config.name}"
    options = ClassifierOptions.from_mapping(config.options, where=where).model_dump()
    tower = build_image_tower(ImagePartConfig.from_mapping({"name": rest, "init": config.init, **options}, where=where))
    model = Classifier(tower, name=config.name)
    model.random_towers = ("image",) if tower.random else ()
    return model


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> Classifier:  # noqa: ARG001
    """A folder that `Classifier.save` wrote; needs no network."""
    options = description["options"]
    model = Classifier(rebuild_image_tower(options["image"], folder), name=str(description["name"]))
    if options["heads"]:
        names = options["classes"]
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"the classes of {folder} are no list of names")
        heads = {
            str(name): ClassHeadConfig.from_mapping(head, where=f"head {name} of {folder}")
            for name, head in options["heads"].items()
        }
        model.set_heads(names, heads, AnswerRule.from_mapping(options["rule"], where=f"rule of {folder}"))
    load_weights(model, read_weights(folder / WEIGHTS), where=folder)
    return model

"""Which of the contracts a model meets, where a command or a method needs one of them."""

from __future__ import annotations

from cmapkd.config import ConfigError
from cmapkd.models.base import DualEncoder, Model
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.types import BOTH


def dual(model: Model, what: str) -> DualEncoder:
    """The model as one that embeds pictures and texts.

    Args:
        what: who needs one, as the subject of a sentence: `cmapkd export`.
    Raises:
        ConfigError: it is another kind of model.
    """
    if not isinstance(model, DualEncoder):
        does = "writes answers" if isinstance(model, GenerativeModel) else model.does
        raise ConfigError(
            f"{what} needs a model that embeds pictures and texts, and {model.name} does not: it {does}. "
            "Name an image-text model, see docs/models.md."
        )
    return model


def both_towers(model: Model, what: str) -> DualEncoder:
    """The model as one that embeds pictures and texts, with a tower for each.

    Args:
        what: who needs one, as the subject of a sentence: `cmapkd export`.
    Raises:
        ConfigError: it is another kind of model, or has an image tower alone.
    """
    whole = dual(model, what)
    if whole.towers != BOTH:
        raise ConfigError(
            f"{what} needs a model that embeds pictures and texts, and {model.name} has an image tower alone: such a "
            "model can only be a further teacher"
        )
    return whole


def writing(model: Model, what: str) -> GenerativeModel:
    """The model as one that writes answers.

    Raises:
        ConfigError: it is another kind of model.
    """
    if not isinstance(model, GenerativeModel):
        raise ConfigError(
            f"{what} needs a model that writes answers, and {model.name} does not: it {model.does}. "
            "Name one that does, for example tiny_vlm:small, see docs/models.md."
        )
    return model

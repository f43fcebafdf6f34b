"""Whether a model's name stands for trained weights, and how to name those that its family has."""

from __future__ import annotations

from pathlib import Path

from cmapkd.models.config import FAMILIES, ModelConfig
from cmapkd.models.families import family as family_of


def why_untrained(config: ModelConfig) -> str | None:
    """Why the weights would be random, with the name that would not; None where they are trained, or nobody knows.

    A family says so by a function `untrained(rest)`, which few need.
    """
    if config.checkpoint is not None or config.inherit is not None:
        return None
    if config.init == "scratch":
        return f"{config.name} begins with random weights: init is scratch"
    family, colon, rest = config.name.partition(":")
    if not colon or family not in FAMILIES or Path(rest).exists():
        return None
    says = getattr(family_of(family), "untrained", None)
    why: str | None = says(rest) if says is not None else None
    return None if why is None else f"{config.name} {why}"

"""From a recipe on the command line to its config: mistakes in single keys are answered before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmapkd.run import RunConfig


def read_recipe(recipe: str, overrides: Sequence[str] | None) -> RunConfig:
    """The config of a run.

    Raises:
        ConfigError: the recipe is not found, is not YAML, or any key or value is wrong.
    """
    return config_of(recipe, checked_recipe(recipe, overrides))


def checked_recipe(recipe: str, overrides: Sequence[str] | None) -> dict[str, Any]:
    """The settings of a recipe, each checked by itself, in about a second.

    Raises:
        ConfigError: the recipe is not found, is not YAML, or a single key or value is wrong.
    """
    from cmapkd.config import load_mapping
    from cmapkd.settings import check_recipe

    values = load_mapping(recipe, overrides or [])
    check_recipe(values, where=_where(recipe))
    return values


def config_of(recipe: str, values: dict[str, Any]) -> RunConfig:
    """The config of checked settings. Imports torch.

    Raises:
        ConfigError: settings do not fit together.
    """
    from cmapkd.run import RunConfig

    return RunConfig.from_mapping(values, where=_where(recipe))


def _where(recipe: str) -> str:
    return f"recipe {recipe!r}"

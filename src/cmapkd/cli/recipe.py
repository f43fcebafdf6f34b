"""From a recipe on the command line to its config: mistakes in single keys are answered before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmapkd.run import RunConfig


def read_recipe(recipe: str, overrides: Sequence[str] | None) -> RunConfig:
    """The config of a run.

    Raises:
        ConfigError: the recipe is not found, is not YAML, or any key or value is wrong.
    """
    from cmapkd.config import load_mapping
    from cmapkd.settings import check_recipe

    where = f"recipe {recipe!r}"
    values = load_mapping(recipe, overrides or [])
    check_recipe(values, where=where)

    from cmapkd.run import RunConfig

    return RunConfig.from_mapping(values, where=where)

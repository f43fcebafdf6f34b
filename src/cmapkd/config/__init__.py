"""Strict configs: typed models that refuse unknown keys, loaded from YAML recipes and `key=value` overrides."""

from cmapkd.config.base import Config, ConfigError, closest
from cmapkd.config.printing import in_markdown, printable
from cmapkd.config.load import apply_overrides, list_recipes, load_config, load_mapping, merge_mappings

__all__ = [
    "Config",
    "ConfigError",
    "apply_overrides",
    "closest",
    "in_markdown",
    "list_recipes",
    "load_config",
    "load_mapping",
    "merge_mappings",
    "printable",
]

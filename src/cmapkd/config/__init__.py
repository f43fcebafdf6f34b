"""Strict configs: typed models that refuse unknown keys, loaded from YAML recipes and `key=value` overrides."""

from cmapkd.config.base import Config, ConfigError, closest
from cmapkd.config.load import apply_overrides, list_recipes, load_config, load_mapping, merge_mappings

__all__ = [
    "Config",
    "ConfigError",
    "apply_overrides",
    "closest",
    "list_recipes",
    "load_config",
    "load_mapping",
    "merge_mappings",
]

"""Strict configs: typed models that refuse unknown keys, loaded from YAML recipes and `key=value` overrides."""

from cmapkd.config.base import Config, ConfigError, closest
from cmapkd.config.load import list_recipes, load_config, load_mapping

__all__ = ["Config", "ConfigError", "closest", "list_recipes", "load_config", "load_mapping"]

"""Strict configs: typed models that refuse unknown keys, loaded from YAML recipes and `key=value` overrides."""

from cmapkd.config.base import Config, ConfigError, RunStopped, closest
from cmapkd.config.disk import DiskError, writing
from cmapkd.config.extras import install_advice
from cmapkd.config.load import apply_overrides, list_recipes, load_config, load_mapping, merge_mappings, recipe_summary
from cmapkd.config.plugins import PluginWarning, Registry
from cmapkd.config.printing import counted, in_bytes, in_markdown, printable
from cmapkd.config.resumable import RESUMABLE, RESUME, fixed_differences, resumable_keys, resumed_by
from cmapkd.config.secrets import redact, refuse_secrets

__all__ = [
    "RESUMABLE",
    "RESUME",
    "Config",
    "ConfigError",
    "DiskError",
    "PluginWarning",
    "Registry",
    "RunStopped",
    "apply_overrides",
    "closest",
    "counted",
    "fixed_differences",
    "in_bytes",
    "in_markdown",
    "install_advice",
    "list_recipes",
    "load_config",
    "load_mapping",
    "merge_mappings",
    "printable",
    "recipe_summary",
    "redact",
    "refuse_secrets",
    "resumable_keys",
    "resumed_by",
    "writing",
]

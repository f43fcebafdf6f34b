"""What decides a model's answers beside its weights: the settings of its architecture, without names and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

_NO_SETTINGS = frozenset(
    {"architectures", "auto_map", "dtype", "hub_id", "name", "torch_dtype", "transformers_version"}
)


def settings_text(model: nn.Module, *more: Any) -> str:
    """The configs of all transformers models inside, and `more`, as JSON. Paths and private entries are left out.

    Two models with equal weights may differ in them: an activation, the layer that is read, how tokens are pooled.
    """
    configs = [config.to_dict() for module in model.modules() if hasattr(config := _config_of(module), "to_dict")]
    return json.dumps([_settings(each) for each in (*configs, *more)], sort_keys=True, default=str)


def _config_of(module: nn.Module) -> Any:
    return module.__dict__.get("config")


def _settings(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _settings(each)
            for key, each in value.items()
            if key not in _NO_SETTINGS and not str(key).startswith("_")
        }
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_settings(each) for each in value]
    return value

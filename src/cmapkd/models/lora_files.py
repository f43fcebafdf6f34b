"""Adapters in the files of the library peft: `adapter_config.json` and `adapter_model.safetensors`.

Layout: peft's page on its checkpoint format, https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.models.lora import LoraLinear, adapters_of, exchange
from cmapkd.models.storage import check_sizes, read_weights, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft wraps a model twice
_MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<matrix>[AB])(?:\.default)?\.weight")
_UNKNOWN = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "layer_replication")


def write_adapters(model: nn.Module, folder: Path, *, base: str) -> None:
    """Writes the adapters of a transformers model, so that peft loads them over the model that they were learned on.

    Args:
        base: the name of that model.
    """
    layers = adapters_of(model)
    first = next(iter(layers.values()))
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base.removeprefix("hf:"),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # whole names: vision towers have layers with the same last words
        "target_modules": "|".join(re.escape(path) for path in layers),
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {f"{_PREFIX}{path}.lora_A.weight": layer.lora_A for path, layer in layers.items()}
    tensors |= {f"{_PREFIX}{path}.lora_B.weight": layer.lora_B for path, layer in layers.items()}
    write_tensors(folder / WEIGHTS, tensors)


def read_adapters(model: nn.Module, language: str, folder: Path) -> None:
    """Puts the adapters of a folder beside the linear layers that they belong to, in place.

    Adapters that were learned under another version of transformers have other words in front of the layer's number.
    They are matched from there on, inside the language model.

    Args:
        language: the name of the language model in `model`.
    Raises:
        ConfigError: the folder holds something else than plain LoRA.
        ValueError: files are missing, or a matrix fits no layer.
    """
    rank, alpha = _sizes(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_weights(folder / WEIGHTS).items():
        found = _MATRIX.fullmatch(key.removeprefix(_PREFIX))
        if found is None:
            raise ConfigError(f"{folder / WEIGHTS} has {key!r}, which is no matrix of plain LoRA")
        pairs.setdefault(found["layer"], {})[found["matrix"]] = tensor
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    short = {_from_layer(path): path for path in linears if path.startswith(f"{language}.")}
    for layer, matrices in pairs.items():
        path = layer if layer in linears else "" if "vis" in layer else short.get(_from_layer(layer), "")
        if not path.startswith(f"{language}."):
            raise ValueError(f"{folder / WEIGHTS} has an adapter of {layer!r}: the language model has no such layer")
        if "A" in matrices and len(matrices["A"]) != rank:  # before room is made for what a file from outside claims
            raise ValueError(
                f"{folder / WEIGHTS}: lora_A of {layer} has {len(matrices['A'])} rows, and {CONFIG} says r = {rank}"
            )
        made = LoraLinear(linears[path], rank=rank, alpha=alpha)
        _fill(made, matrices, where=f"{folder / WEIGHTS}: {layer}")
        exchange(model, path, made)
    if not pairs:
        raise ValueError(f"{folder / WEIGHTS} holds no adapters")


def _fill(layer: LoraLinear, matrices: dict[str, Tensor], *, where: str) -> None:
    with torch.no_grad():
        for matrix, own in (("A", layer.lora_A), ("B", layer.lora_B)):
            value = matrices.get(matrix)
            if value is None or value.shape != own.shape:
                shape = "missing" if value is None else str(tuple(value.shape))
                raise ValueError(f"{where}: lora_{matrix} is {shape}, the layer needs {tuple(own.shape)}")
            own.copy_(value)


def _sizes(folder: Path) -> tuple[int, float]:
    """Rank, and alpha as it acts on B A / rank."""
    path = folder / CONFIG
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        check_sizes(config, where=path)
        rank, alpha = int(config.get("r", 8)), float(config.get("lora_alpha", 8))  # peft's defaults
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no readable configuration of an adapter: {error}") from None
    wrong = [key for key in _UNKNOWN if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or wrong or rank < 1:
        raise ConfigError(
            f"{path} is not of plain LoRA ({', '.join(wrong) or 'peft_type, bias or rank'}): merge the adapters where "
            "they were made (merge_and_unload), and name the merged model"
        )
    return rank, alpha * rank**0.5 if config.get("use_rslora") else alpha  # there it is alpha / sqrt(rank)


def _from_layer(path: str) -> str:
    """The name from the layer's number on: `layers.3.self_attn.q_proj`."""
    start = path.rfind("layers.")
    return path[start:] if start >= 0 else path

"""One tower of a transformers folder: its config, its weights, its blocks. Code in a repository is never run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from cmapkd.config import ConfigError
from cmapkd.models.errors import first_line
from cmapkd.models.storage import check_sizes

PartKind = Literal["image", "text"]
# Towers of image-text models have classes of their own; everything else goes by the Auto classes.
_OF_PAIRS = {
    ("clip", "image"): "CLIPVisionModel",
    ("clip", "text"): "CLIPTextModel",
    ("siglip", "image"): "SiglipVisionModel",
}


def read_config(source: str, fetching: dict[str, Any], name: str) -> Any:
    """The config of a folder or hub id.

    Raises:
        ConfigError: there is none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **fetching)
    except Exception as error:
        raise ConfigError(
            f"{name}: transformers finds no config that it can read in {source!r} ({first_line(error)}). Give a folder "
            "with config.json, or a hub id; without a network, download the repository elsewhere and give its folder."
        ) from None
    check_sizes(config.to_dict(), where=name)
    return config


def load_part(
    source: str, config: Any, fetching: dict[str, Any], name: str, kind: PartKind, *, scratch: bool, pooler: bool
) -> nn.Module:
    """A tower with its weights as float32, or with random ones. Weights of other towers and heads are left out.

    Args:
        pooler: whether the encoder's own pooler is read; else it is left out, and its weights may be missing.
    Raises:
        ConfigError: transformers has no such tower.
        ValueError: weights are missing, unsafe or do not fit.
    """
    if scratch:
        return from_config(config, kind, pooler=pooler)
    found = _class(config, kind)
    try:
        with _silence():
            model, report = found.from_pretrained(
                source,
                dtype=torch.float32,
                weights_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                **fetching,
            )
    except Exception as error:
        raise ValueError(
            f"the weights of {name} could not be loaded ({type(error).__name__}: {first_line(error)}). They must be "
            "model.safetensors, or a torch file of tensors only, of this config's shapes."
        ) from None
    missing = sorted(key for key in report["missing_keys"] if pooler or "pooler." not in key)
    wrong = sorted(str(key) for key in report["mismatched_keys"])
    if missing or wrong:
        kinds = (("missing", missing), ("of another shape", wrong))
        problems = [f"{len(names)} {what} ({', '.join(names[:4])})" for what, names in kinds if names]
        raise ValueError(f"the weights of {name} do not fit its config.json: {'; '.join(problems)}.")
    return _bare(model, pooler=pooler)


@contextmanager
def _silence() -> Iterator[None]:
    """Without transformers' report of what it left out and what it missed, which is judged here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def from_config(config: Any, kind: PartKind, *, pooler: bool) -> nn.Module:
    """The same tower with random weights."""
    found = _class(config, kind)
    inner = getattr(config, f"{'vision' if kind == 'image' else 'text'}_config", config)
    made = found(inner) if hasattr(found, "config_class") else found.from_config(inner, trust_remote_code=False)
    return _bare(made.float(), pooler=pooler)


def blocks_of(model: Any) -> Sequence[nn.Module]:
    """The tower's blocks, shallow to deep; none where they are not in one list, as where they share weights."""
    try:
        return tuple(model.get_submodule(".".join(path_of_blocks(model))))
    except LookupError:
        return ()


def path_of_blocks(model: Any) -> tuple[str, ...]:
    """The names that lead to the list of the tower's blocks.

    Raises:
        LookupError: they are not in one list.
    """
    depth = getattr(model.config, "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and depth:
            return tuple(name.split("."))
    raise LookupError("blocks")


def keep_first_blocks(model: Any, count: int, *, name: str) -> None:
    """Leaves out, in place, the blocks behind the first `count`; the tower's config says so.

    Raises:
        ConfigError: the tower has fewer, or shares its blocks' weights, or its config cannot say it.
    """
    try:
        path = path_of_blocks(model)
    except LookupError:
        raise ConfigError(
            f"the blocks of {name} are not in one list, so none can be left out: leave `blocks` out"
        ) from None
    listed: nn.ModuleList = model.get_submodule(".".join(path))
    if count > len(listed):
        raise ConfigError(f"blocks is {count}, and {name} has {len(listed)}: give a number up to that, or leave it out")
    model.set_submodule(".".join(path), listed[:count])
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    with torch.device("meta"):
        again = from_config(model.config, "text", pooler=False)
    if {key: each.shape for key, each in again.state_dict().items()} != {
        key: each.shape for key, each in model.state_dict().items()
    }:
        raise ConfigError(f"transformers builds another tower from the config of {name} with {count} blocks")


def _class(config: Any, kind: PartKind) -> Any:
    import transformers

    own = _OF_PAIRS.get((config.model_type, kind)) or _OF_PAIRS.get((config.model_type.split("_")[0], kind))
    if own is not None:
        return getattr(transformers, own)
    if config.model_type in ("siglip", "siglip_text_model"):
        raise ConfigError("SigLIP's text tower pools a text at its full length: name the whole model, hf:FOLDER")
    if hasattr(config, "vision_config"):
        raise ConfigError(
            f"model_type {config.model_type!r} is no single tower: give a folder of an image or a text encoder"
        )
    if getattr(config, "is_encoder_decoder", False) or config.model_type.endswith("t5"):
        return transformers.AutoModelForTextEncoding
    return transformers.AutoModel


def _bare(model: Any, *, pooler: bool) -> nn.Module:
    """Without the pooler that an encoder for classification ends in, where nothing reads it.

    Of T5 the encoder's stack alone: around it, transformers names the word table twice.
    """
    if hasattr(model, "shared") and hasattr(model, "encoder"):
        model = model.encoder
    if not pooler and getattr(model, "pooler", None) is not None:
        model.pooler = None
    module: nn.Module = model
    return module

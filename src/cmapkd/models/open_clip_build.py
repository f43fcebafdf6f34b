"""open_clip models from their configs: the untrained architecture, its image size, and weights under native names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.models.errors import first_line
from cmapkd.models.images import ImageSpec
from cmapkd.models.storage import check_sizes


def construct(config: Mapping[str, Any], preprocess: Mapping[str, Any], *, where: str) -> nn.Module:
    """The untrained architecture of an open_clip `model_cfg`, chosen and built as `open_clip.create_model` does.

    Raises:
        ConfigError: open_clip cannot build it, or it is of a kind we do not support.
    """
    import open_clip

    check_sizes(config, where=where)
    arguments = deepcopy(dict(config))
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - arguments.keys()
    if missing:
        raise ConfigError(f"{where} is no open_clip model config: it lacks {', '.join(sorted(missing))}")
    if "multimodal_cfg" in arguments:
        raise ConfigError(f"{where} is a CoCa model (it has a multimodal_cfg): only CLIP and SigLIP are supported")
    for part in ("vision_cfg", "text_cfg"):
        if not isinstance(arguments[part], dict):
            raise ConfigError(f"{where} is no open_clip model config: its {part} is no object")
    custom = arguments.pop("custom_text", False) or bool(arguments["text_cfg"].get("hf_model_name"))
    try:
        model: Any = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**arguments)
    except (
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
        LookupError,
        OSError,
        ArithmeticError,
        AttributeError,
    ) as error:
        raise ConfigError(f"open_clip cannot build {where}: {first_line(error)}") from None
    size = model.visual.image_size
    size = size if isinstance(size, Sequence) else (size, size)
    open_clip.set_model_preprocess_cfg(model, {**preprocess, "size": tuple(size)})
    return model.float()  # type: ignore[no-any-return]


def fit_image_size(model: Any, *, where: str) -> None:
    """Makes a timm tower take the size that its config names: timm itself resamples the position embedding.

    Raises:
        ConfigError: the tower has one fixed size.
    """
    trunk = getattr(model.visual, "trunk", None)
    if trunk is None:
        return
    size, own = tuple(model.visual.image_size), tuple(trunk.pretrained_cfg.get("input_size", (3, 0, 0))[-2:])
    if size == own:
        return
    if hasattr(trunk, "set_input_size"):
        try:
            model.visual.set_input_size(size)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{where} cannot be built for images of {size[0]} pixels: {first_line(error)}") from None
    elif trunk.pretrained_cfg.get("fixed_input_size"):
        raise ConfigError(f"{where} takes images of {own[0]} pixels only, image_size is {size[0]}")


def load_native_weights(model: Any, weights: dict[str, Tensor], *, where: str | Path) -> None:
    """Weights under open_clip's names, or those of the projects that it converts from, as its own loader takes them.

    Position embeddings are resampled to the model's size.

    Raises:
        ValueError: they do not fit.
    """
    try:
        model.load_state_dict(_converted(model, weights), strict=True)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"the weights in {where} do not fit {type(model).__name__}: {' '.join(lines[:4])[:600]}. "
            "Name the architecture that they were trained with."
        ) from None


def _converted(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The steps of `open_clip.load_checkpoint` between reading a file, which we do ourselves, and copying its weights.

    open_clip itself knows neither all wrappers of names nor numpy's numbers in a torch file.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    weights = convert_state_dict(model, weights)
    if "positional_embedding" in weights and not hasattr(model, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)
    for name in ("logit_scale", "logit_bias"):  # a number, or a vector of one
        own = getattr(model, name)
        if name in weights and own is not None:
            weights[name] = weights[name].reshape(own.shape)
    if model.logit_bias is not None and "logit_bias" not in weights:  # CLIP's weights, to be trained as SigLIP
        weights["logit_bias"] = torch.zeros_like(weights["logit_scale"])
    places = "text.transformer.embeddings.position_ids"  # 0, 1, 2, ..., which older transformers saved
    if places not in model.state_dict():
        weights.pop(places, None)
    resize_pos_embed(weights, model)
    resize_text_pos_embed(weights, model)
    return weights


def image_spec(visual: Any, preprocess: Mapping[str, Any]) -> ImageSpec:
    """open_clip's evaluation transform in our terms."""
    size = visual.image_size
    height, width = size if isinstance(size, Sequence) else (size, size)
    if height != width:
        raise ConfigError(f"image_size {tuple(size)} is not square: only square inputs are supported")
    mode = preprocess.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise ConfigError(f"resize_mode {mode!r} (padding to a square) is not supported, only 'shortest' and 'squash'")
    mean, std = (tuple(float(v) for v in preprocess[key]) for key in ("mean", "std"))
    interpolation = "bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic"  # as open_clip decides
    return ImageSpec(
        int(height),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        interpolation=interpolation,  # type: ignore[arg-type]
        fit="crop" if mode == "shortest" else "squash",
    )

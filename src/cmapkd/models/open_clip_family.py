"""Names after `open_clip:`: a zoo architecture, with or without a pretrained tag; a config file; a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import Field

from cmapkd.config import Config, ConfigError, closest
from cmapkd.models.base import DualEncoder
from cmapkd.models.config import ModelConfig
from cmapkd.models.families import Loader
from cmapkd.models.open_clip_build import construct, fit_image_size, load_native_weights
from cmapkd.models.open_clip_model import NATIVE_CONFIG, NATIVE_WEIGHTS, TEXT_CONFIG, OpenClipModel
from cmapkd.models.open_clip_pruning import resize
from cmapkd.models.open_clip_tokenizer import KEPT_TOKENS, is_siglip, make_tokenizer
from cmapkd.models.prunable import TowerSizes
from cmapkd.models.storage import load_weights, read_weights
from cmapkd.models.types import BOTH, Tower

# In open_clip's own order, safe formats first.
_WEIGHT_FILES = (
    NATIVE_WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
_QUICK = "-quickgelu"  # ends the name of the same architecture with the other activation
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")


class OpenClipOptions(Config):
    """What can be changed about an open_clip model. Precision is float32: the trainer's autocast decides the rest."""

    image_size: int | None = Field(
        None, ge=16, description="Height and width of the input, in pixels; position embeddings are resampled."
    )
    context_length: int | None = Field(
        None, ge=2, description="Longest text, in tokens; position embeddings are resampled."
    )
    quick_gelu: bool | None = Field(
        None, description="OpenAI's approximation of GELU. None: as the weights' tag says, else as the config says."
    )


def build(rest: str, config: ModelConfig, captions: Iterable[str] | None) -> DualEncoder:  # noqa: ARG001
    """Resolves a name in this order: zoo architecture, architecture/tag, config file, folder."""
    import open_clip

    options = OpenClipOptions.from_mapping(config.options, where=f"options of {config.name}")
    name, _, tag = rest.partition("/")
    zoo = open_clip.list_models()
    if rest in zoo:
        either = options.quick_gelu is None and f"{rest}{_QUICK}" in zoo
        model_config = open_clip.get_model_config(rest)
        return _assemble(config.name, model_config, _preprocess({}), options, either_activation=either)
    if name in zoo:
        return _pretrained(name, tag, config, options)
    path = Path(rest).expanduser()
    if path.is_file():
        model_config, preprocess = _read_config(path)
        return _assemble(config.name, model_config, preprocess, options)
    if path.is_dir():
        return _folder(path, config, options)
    if path.suffix == ".json" or rest.startswith((".", "/", "~")) or rest.count("/") > 1:
        raise ConfigError(f"{config.name}: there is no file or folder {path}")
    raise ConfigError(
        f"open_clip has no architecture {name!r}{closest(name, zoo)}, and there is no file or folder {rest!r}. "
        "open_clip.list_models() lists the architectures; a config file ends in .json."
    )


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> OpenClipModel:  # noqa: ARG001
    """A folder that `OpenClipModel.save` wrote; needs no network."""
    model_config, preprocess = description["options"]["config"], description["options"]["preprocess"]
    building = deepcopy(model_config)
    if (folder / TEXT_CONFIG).is_dir():
        building["text_cfg"].update(hf_model_name=str(folder / TEXT_CONFIG), hf_model_pretrained=False)
    model = construct(building, preprocess, where=f"model folder {folder}")
    fit_image_size(model, where=f"model folder {folder}")
    sizes: dict[Tower, TowerSizes] | None = None
    if "sizes" in description["options"]:
        sizes = {tower: TowerSizes.read(values) for tower, values in description["options"]["sizes"].items()}
        resize(model, sizes)
    load_weights(model, read_weights(folder / NATIVE_WEIGHTS), where=folder)
    kept = json.loads((folder / KEPT_TOKENS).read_text()) if (folder / KEPT_TOKENS).is_file() else None
    return OpenClipModel(
        model,
        config=model_config,
        preprocess=preprocess,
        tokenizer=make_tokenizer(model_config["text_cfg"], folder=folder, kept=kept),
        name=str(description["name"]),
        family=str(description["family"]),
        sizes=sizes,
        kept=kept,
    )


def _pretrained(name: str, tag: str, config: ModelConfig, options: OpenClipOptions) -> OpenClipModel:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    entry = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if not entry:
        known = ", ".join(tags) or "none"
        raise ConfigError(f"open_clip:{name} has no weights {tag!r}{closest(tag, tags)}; it has: {known}")
    if options.quick_gelu is None:  # open_clip only warns where the two differ
        options = options.model_copy(update={"quick_gelu": bool(entry.get("quick_gelu", False))})
    model_config, preprocess = open_clip.get_model_config(name), _preprocess(entry)
    if config.init == "scratch":
        return _assemble(config.name, model_config, preprocess, options)
    try:
        weights = Path(open_clip.download_pretrained(entry))
    except Exception as error:
        source = entry.get("hf_hub") or entry.get("url")
        raise ValueError(
            f"the weights of {config.name} are not on this machine and could not be fetched from {source} "
            f"({type(error).__name__}). Connect to the network once; or copy the file here and name it as `checkpoint` "
            f"beside `init: scratch`."
        ) from None
    return _assemble(config.name, model_config, preprocess, options, weights=weights)


def _folder(folder: Path, config: ModelConfig, options: OpenClipOptions) -> OpenClipModel:
    """A folder in open_clip's format, as its `push_to_hf_hub` uploads and its `local-dir:` reads."""
    if not (folder / NATIVE_CONFIG).is_file():
        raise ConfigError(f"{folder} is no open_clip model folder: it has no {NATIVE_CONFIG}")
    model_config, preprocess = _read_config(folder / NATIVE_CONFIG)
    if (folder / TEXT_CONFIG).is_dir():
        model_config["text_cfg"]["hf_model_name"] = str(folder / TEXT_CONFIG)
    weights = None
    if config.init == "auto":
        weights = next((folder / file for file in _WEIGHT_FILES if (folder / file).is_file()), None)
        if weights is None:
            raise ValueError(
                f"{folder} has no weights: looked for {', '.join(_WEIGHT_FILES)}. Copy them there, or set `init: "
                "scratch` for the untrained architecture."
            )
    return _assemble(config.name, model_config, preprocess, options, weights=weights, folder=folder)


def _assemble(
    name: str,
    model_config: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    options: OpenClipOptions,
    *,
    weights: Path | None = None,
    folder: Path | None = None,
    either_activation: bool = False,
) -> OpenClipModel:
    """Applies the options, builds, and loads `weights` if there are any."""
    config = deepcopy(dict(model_config))
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})  # `construct` says if one is missing
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise ConfigError(f"{name} is no open_clip model config: vision_cfg and text_cfg must be objects")
    vision.pop("output_tokens", None)  # CoCa's; they would make the towers return pairs
    text.pop("output_tokens", None)
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False  # the weights are ours to load
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    if options.image_size is not None:
        vision["image_size"] = options.image_size
    if options.context_length is not None:
        text["context_length"] = options.context_length
    if options.quick_gelu is not None:
        config["quick_gelu"] = options.quick_gelu
    if is_siglip(text):  # as every SigLIP config of open_clip says; a folder may leave it out
        text["tokenizer_kwargs"] = {"clean": "canonicalize", **(text.get("tokenizer_kwargs") or {})}
    model = construct(config, preprocess, where=name)
    if weights is not None:
        load_native_weights(model, read_weights(weights), where=weights)
    fit_image_size(model, where=name)
    ready = make_tokenizer(text, folder=folder)
    assembled = OpenClipModel(
        model,
        config=config,
        preprocess=preprocess,
        tokenizer=ready,
        name=name,
        either_activation=either_activation,
    )
    assembled.random_towers = BOTH if weights is None else ()
    return assembled


def _preprocess(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's evaluation preprocessing, and what the weights' own entry says otherwise."""
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg

    merged = {**asdict(PreprocessCfg()), **{key: value for key, value in overrides.items() if value is not None}}
    values = {key: merged[key] for key in _PREPROCESS_KEYS}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and preprocessing of a JSON file: open_clip's architecture files hold the first alone."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model_config = values.get("model_cfg", values)
        return dict(model_config), _preprocess(values.get("preprocess_cfg") or {})
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no open_clip model config: {error}") from None


def names() -> list[str]:
    """open_clip's architectures, then each with the tags of its weights."""
    import open_clip

    return [*open_clip.list_models(), *(f"{name}/{tag}" for name, tag in open_clip.list_pretrained())]

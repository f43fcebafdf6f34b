"""Names after `hf:`: a Hugging Face hub id or a local folder in transformers' format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from cmapkd.config import Config, ConfigError
from cmapkd.models.base import Model
from cmapkd.models.config import ModelConfig
from cmapkd.models.errors import first_line
from cmapkd.models.families import Loader
from cmapkd.models.hf_model import HfModel
from cmapkd.models.hf_tokenizer import (
    HfTokenizer,
    as_siglip_was_trained,
    check_end_token,
    load_tokenizer,
    pad_on_the_right,
)
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.hf_vlm_build import HfVlmOptions, check_library
from cmapkd.models.hf_vlm_build import assemble as assemble_vlm
from cmapkd.models.hub import hub_options, locate
from cmapkd.models.storage import check_sizes
from cmapkd.models.types import BOTH
from cmapkd.models.vlm_layouts import LAYOUTS

SUPPORTED = {"clip": "CLIPModel", "siglip": "SiglipModel"}
"""Classes of models that embed, by `model_type`; those of models that write are in `LAYOUTS`."""

_SAFE = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class HfOptions(Config):
    """What can be chosen about a transformers model; its sizes are in its config.json."""

    takers: ClassVar[str] = "models that embed"

    context_length: int | None = Field(
        None, ge=2, description="Longest text, in tokens. None: as long as the model takes."
    )
    tokenizer: str | None = Field(None, description="Folder or hub id of the tokenizer. None: the model's own.")
    revision: str | None = Field(None, description="Commit or branch of the hub repository. None: its main branch.")


def build(rest: str, config: ModelConfig, captions: Iterable[str] | None) -> Model:
    """The model with its weights, or with `init: scratch` its architecture with random ones.

    Args:
        captions: training texts, read where the options ask for their tokens alone.
    """
    source, fetching = locate(rest, where=config.name, revision=config.options.get("revision"))
    local = Path(source).is_dir()
    model_config = _config(source, local, fetching, config.name)
    if config.init == "scratch":
        model = _scratch(model_config)
    else:
        if local:
            _check_weight_files(Path(source))
        half = config.dtype == "bf16" and model_config.model_type in LAYOUTS
        model = _pretrained(source, model_config, fetching, config.name, torch.bfloat16 if half else torch.float32)
    where = f"options of {config.name}"
    if model_config.model_type in LAYOUTS:
        chosen = HfVlmOptions.from_mapping(config.options, where=where)
        scratch = config.init == "scratch"
        return assemble_vlm(source, model, chosen, fetching, config.name, scratch=scratch, texts=captions)
    options = HfOptions.from_mapping(config.options, where=where)
    return _assemble(source, model, options, fetching, config.name, scratch=config.init == "scratch")


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> Model:  # noqa: ARG001
    """A folder that `HfModel.save` or `HfVlm.save` wrote; needs no network."""
    name, stored = str(description["name"]), description["options"]
    _check_weight_files(folder)
    model = _pretrained(str(folder), _config(str(folder), True, {}, name), {}, str(folder))
    if model.config.model_type in LAYOUTS:
        kept = HfVlmOptions(max_tokens=stored["max_tokens"])
        return assemble_vlm(str(folder), model, kept, {}, name, scratch=False)
    options = HfOptions(context_length=stored["context_length"])
    return _assemble(str(folder), model, options, {}, name, scratch=False)


def blank(folder: Path, options: Mapping[str, Any], name: str) -> HfVlm:
    """A model that writes, of a folder with config and processor, with random weights.

    Args:
        options: `max_tokens` of its dialogues.
    """
    from transformers import GenerationConfig

    model = _scratch(_config(str(folder), True, {}, name))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    kept = HfVlmOptions(max_tokens=options["max_tokens"])
    return assemble_vlm(str(folder), model, kept, {}, name, scratch=False)


def _config(source: str, local: bool, fetching: dict[str, Any], where: str) -> Any:
    """The model's config, refused unless it is of a kind we support. Code in a repository is never run."""
    from transformers import AutoConfig

    supported = ", ".join(f"{kind} ({name})" for kind, name in _classes().items())
    if local and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} is no transformers model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **fetching)
    except (OSError, ConnectionError) as error:
        offline = "local_files_only" in fetching
        why = (
            "the Hugging Face hub cannot be reached, and this machine's cache does not have it"
            if offline
            else f"the Hugging Face hub gave no config.json ({first_line(error)})"
        )
        raise ValueError(
            f"there is no model {where}: {source!r} is no local folder, and {why}. Check the name"
            + (" and the network" if offline else "")
            + "; without a network, download the repository elsewhere and give its folder."
        ) from None
    except Exception as error:  # of a damaged config, anything
        raise ConfigError(
            f"{where}: transformers cannot read its config ({first_line(error)}). Supported: {supported}."
        ) from None
    if config.model_type == "siglip2":
        raise ConfigError(
            f"{where} is a NaFlex SigLIP 2 model, whose number of patches varies: use a fixed-resolution one, for "
            "example hf:google/siglip2-base-patch16-224 (its model_type is siglip)."
        )
    if config.model_type not in _classes():
        raise ConfigError(
            f"{where} has model_type {config.model_type!r}, which is not supported. Supported: {supported}."
        )
    check_sizes(config.to_dict(), where=where)
    if config.model_type in LAYOUTS:
        check_library(where)
        return config
    for key in ("image_size", "patch_size"):
        if not isinstance(getattr(config.vision_config, key), int):
            raise ConfigError(f"{where} has a {key} that is not square: only square ones are supported")
    if config.model_type == "siglip" and not config.vision_config.vision_use_head:
        raise ConfigError(f"{where} has no pooling head (vision_use_head is false), so it has no image embedding")
    return config


def _scratch(config: Any) -> Any:
    """Random weights, as the library draws them, but SigLIP's scale and bias, which it leaves at zero."""
    model = _class(config)(config).float()
    if config.model_type == "siglip":
        with torch.no_grad():  # arXiv:2303.15343, section 3.2: t' = log 10 and b = -10
            model.logit_scale.fill_(math.log(10))
            model.logit_bias.fill_(-10.0)
    return model


def _pretrained(
    source: str, config: Any, fetching: dict[str, Any], where: str, dtype: torch.dtype = torch.float32
) -> Any:
    """Weights from safetensors, or from a file that loads without unpickling objects.

    Args:
        dtype: of the weights, from the start: a model in half precision never takes the memory of a whole one.
    Raises:
        ValueError: they are missing, unsafe or do not fit.
    """
    try:
        model, report = _class(config).from_pretrained(
            source, config=config, dtype=dtype, weights_only=True, output_loading_info=True, **fetching
        )
    except Exception as error:
        raise ValueError(
            f"the weights of {where} could not be loaded ({type(error).__name__}: {first_line(error)}). They must be "
            "model.safetensors, or a torch file of tensors only, of exactly this config's shapes. To convert a file "
            "whose origin you trust, where it was made: model.save_pretrained(folder, safe_serialization=True)."
        ) from None
    missing = sorted(report["missing_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.endswith(".position_ids"))
    wrong = sorted(str(key) for key in report["mismatched_keys"])
    if missing or unexpected or wrong:
        kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        problems = [f"{len(names)} {kind} ({', '.join(names[:4])})" for kind, names in kinds if names]
        raise ValueError(f"the weights of {where} do not fit its config.json: {'; '.join(problems)}.")
    return model


def _check_weight_files(folder: Path) -> None:
    if not any((folder / name).is_file() for name in (*_SAFE, *_PICKLED)):
        raise ValueError(
            f"{folder} has no weights: looked for {', '.join((*_SAFE, *_PICKLED))}. Copy them there, or set `init: "
            "scratch` for the untrained architecture."
        )


def _assemble(
    source: str, model: Any, options: HfOptions, fetching: dict[str, Any], name: str, *, scratch: bool
) -> HfModel:
    config = model.config
    longest = int(config.text_config.max_position_embeddings)
    length = options.context_length or longest
    if length > longest:
        raise ConfigError(f"context_length {length} is longer than {name} takes: {longest} tokens")
    if config.model_type == "siglip" and length != longest:
        raise ConfigError(
            f"{name} pools the last position, so every text must be padded to {longest} tokens, not {length}"
        )
    if options.tokenizer is None:
        native = load_tokenizer(source, fetching, name)
    else:
        native = load_tokenizer(options.tokenizer, {} if Path(options.tokenizer).is_dir() else hub_options(), name)
    if len(native) > config.text_config.vocab_size:
        raise ConfigError(
            f"the tokenizer of {name} has {len(native)} tokens, but the model embeds {config.text_config.vocab_size}: "
            "give the tokenizer that it was trained with."
        )
    siglip = config.model_type == "siglip"
    if siglip:
        as_siglip_was_trained(native, name=name)
    else:
        pad_on_the_right(native)
        # Also for transformers, which reads the saved folder by its config alone.
        config.text_config.eos_token_id = model.text_model.eos_token_id = check_end_token(native, name=name)
    whole = "SigLIP pools the last place of a text, and was trained with padding there" if siglip else None
    tokenizer = HfTokenizer(native, context_length=length, whole_because=whole, canonical=siglip)
    processor = _processor(source, fetching, config, name, scratch=scratch)
    assembled = HfModel(model, tokenizer=tokenizer, processor=processor, name=name)
    assembled.random_towers = BOTH if scratch else ()
    return assembled


def _processor(source: str, fetching: dict[str, Any], config: Any, name: str, *, scratch: bool) -> Any:
    """The repository's image processor; an untrained model without one gets its family's, at the config's size."""
    from transformers import AutoImageProcessor, CLIPImageProcessor, SiglipImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **fetching)
    except Exception as error:
        if not scratch:
            raise ValueError(
                f"{name} has weights but no readable preprocessor_config.json in {source!r} ({first_line(error)}), so "
                "the pixels it was trained on are unknown: copy that file there."
            ) from None
    size = config.vision_config.image_size
    square = {"height": size, "width": size}
    if config.model_type == "clip":
        return CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square)
    return SiglipImageProcessor(size=square)


def _class(config: Any) -> Any:
    import transformers

    return getattr(transformers, _classes()[config.model_type])


def _classes() -> dict[str, str]:
    """transformers' classes by `model_type`, of both contracts."""
    return {**SUPPORTED, **{kind: layout.kind for kind, layout in LAYOUTS.items()}}

"""A causal language model of transformers as the language half of an image-text model, with a tokenizer for both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from cmapkd.config import Config, ConfigError
from cmapkd.models.errors import first_line
from cmapkd.models.hub import locate
from cmapkd.models.images import ImageSpec
from cmapkd.models.storage import check_sizes
from cmapkd.models.tiny_vlm_words import END, START, template_of
from cmapkd.models.vlm_layouts import blocks_of

_PICTURES = ("<image>", "<image_soft_token>")  # placeholders that published tokenizers have
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers


class LanguageConfig(Config):
    """A causal language model. In a recipe the name alone is enough: `text: hf:google/gemma-3-270m`."""

    name: str = Field(description="hf:FOLDER or hub id of a causal language model in transformers' format.")
    init: Literal["auto", "scratch"] = Field(
        "auto", description="auto: its weights; scratch: its architecture with random ones."
    )
    layers: int | None = Field(
        None, ge=1, description="Keeps so many layers, spread from the first to the last. None: all of them."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        return {"name": str(values)} if isinstance(values, str | Path) else values


@dataclass(frozen=True, slots=True)
class Language:
    """A language model with its head, the tokenizer, the token that stands for a picture, and what begins answers."""

    model: Any
    tokenizer: Any
    picture: str
    lead: str = ""


def build_language(config: LanguageConfig, *, where: str) -> Language:
    """The model in float32 with its tokenizer, and one more token where none stands for pictures yet.

    Raises:
        ConfigError: there is none, or it has another form than `inner` asks for.
        ValueError: its weights or its tokenizer cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    name = f"options.text of {where}"
    source, fetching = locate(config.name.removeprefix("hf:"), where=name)
    try:
        settings = AutoConfig.from_pretrained(source, trust_remote_code=False, **fetching)
    except Exception as error:
        raise ConfigError(
            f"{name}: transformers finds no config that it can read in {source!r} ({first_line(error)})"
        ) from None
    check_sizes(settings.to_dict(), where=name)
    model = _untrained(settings, name) if config.init == "scratch" else _trained(source, fetching, name)
    if config.layers is not None:
        _keep_layers(model, config.layers, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **fetching)
    except Exception as error:
        raise ValueError(f"{name}: there is no usable tokenizer in {source!r} ({first_line(error)})") from None
    known = tokenizer.get_vocab()
    picture = next((token for token in _PICTURES if token in known), _PICTURES[0])
    tokenizer.add_special_tokens({"additional_special_tokens": [picture]}, replace_extra_special_tokens=False)
    size = max(tokenizer.get_vocab().values()) + 1
    if size > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(size, mean_resizing=False)
    inner(model, name)
    return Language(model, tokenizer, picture)


def rebuild_language(folder: Path) -> Any:
    """The untrained language model of a folder that `save_language` wrote."""
    from transformers import AutoConfig, GenerationConfig

    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_sizes(settings.to_dict(), where=folder)
    model = _untrained(settings, str(folder))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def save_language(config: Any, generation: Any, folder: Path) -> None:
    """What `rebuild_language` needs."""
    config.save_pretrained(folder)
    generation.save_pretrained(folder)


def inner(model: Any, name: str) -> Any:
    """The model without its head.

    Raises:
        ConfigError: it has no words table and layers where they are looked for, or it scales or caps its logits.
    """
    body = model.base_model
    try:
        blocks_of(body)
        whole = body is not model and body.embed_tokens is not None and model.lm_head is not None
    except (ValueError, AttributeError):
        whole = False
    if not whole or not getattr(model.config, "max_position_embeddings", None):
        raise ConfigError(
            f"{name} ({type(model).__name__}) has another form than Llama's: name a language model with embed_tokens, "
            "layers, lm_head and max_position_embeddings"
        )
    with torch.no_grad():
        ids = torch.arange(4)[None]
        states = body(input_ids=ids, use_cache=False).last_hidden_state
        plain = F.linear(states, model.lm_head.weight, model.lm_head.bias)
        if not torch.allclose(model(input_ids=ids, use_cache=False).logits, plain, rtol=1e-4, atol=1e-4):
            raise ConfigError(f"{name} ({type(model).__name__}) scales or caps its logits, which is not supported here")
    return body


def processor_for(language: Language, spec: ImageSpec, count: int) -> Any:
    """transformers' LLaVA processor: the tower's pixels, and `count` tokens for each picture.

    Dialogues have the form of ChatML or of Gemma where the tokenizer has its tokens, else one without marks of turns.
    """
    from transformers import CLIPImageProcessor, LlavaProcessor, SiglipImageProcessor

    tokens = language.tokenizer
    pixels: dict[str, Any] = {"image_mean": list(spec.mean), "image_std": list(spec.std)}
    pixels["resample"] = _RESAMPLING[spec.interpolation]
    square = {"height": spec.size, "width": spec.size}
    return LlavaProcessor(
        SiglipImageProcessor(size=square, **pixels)
        if spec.fit == "squash"
        else CLIPImageProcessor(size={"shortest_edge": spec.size}, crop_size=square, **pixels),
        tokens,
        patch_size=spec.size,  # one patch, and the others beside it: grids of all shapes are counted right
        num_additional_image_tokens=count - 1,
        vision_feature_select_strategy="full",
        image_token=language.picture,
        chat_template=_template(tokens, language.picture, language.lead),
    )


def _template(tokens: Any, picture: str, lead: str) -> str:
    known = tokens.get_vocab()
    if START in known and END in known:
        return template_of(picture, lead=lead)
    if {"<start_of_turn>", "<end_of_turn>"} <= known.keys():
        return template_of(picture, start="<start_of_turn>", end="<end_of_turn>", assistant="model", lead=lead)
    if tokens.eos_token is None:
        raise ConfigError(
            "the tokenizer has no end token (eos_token), so answers would never end: set one in its files"
        )
    return template_of(picture, start="", end=tokens.eos_token, lead=lead)


def _keep_layers(model: Any, count: int, name: str) -> None:
    """Takes layers out, in place; the config's lists of what each layer is follow."""
    layers = blocks_of(model.base_model)
    depth = len(layers)
    if count > depth:
        raise ConfigError(f"{name}: layers is {count}, but the model has {depth}")
    kept = [round(place * (depth - 1) / max(1, count - 1)) for place in range(count)]
    model.base_model.layers = torch.nn.ModuleList(layers[place] for place in kept)
    settings = model.config
    for key, value in settings.to_dict().items():
        if isinstance(value, list) and len(value) == depth:  # as layer_types
            setattr(settings, key, [value[place] for place in kept])
    settings.num_hidden_layers = count
    for number, layer in enumerate(model.base_model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # under which keys and values are kept while writing
                module.layer_idx = number


def _trained(source: str, fetching: dict[str, Any], name: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            weights_only=True,
            output_loading_info=True,
            trust_remote_code=False,
            **fetching,
        )
    except Exception as error:
        raise ValueError(
            f"{name}: the weights could not be loaded ({type(error).__name__}: {first_line(error)}). They must be "
            "model.safetensors of a causal language model, of its config's shapes."
        ) from None
    wrong = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    if wrong:
        raise ValueError(f"{name}: weights are missing or of another shape: {', '.join(wrong[:4])}")
    return model


def _untrained(settings: Any, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=False).float()
    except ValueError as error:
        raise ConfigError(f"{name}: {first_line(error)}") from None

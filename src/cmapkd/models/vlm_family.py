"""Names after `vlm:`: models that write, made of an image tower and a causal language model that the options name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from cmapkd.config import Config, ConfigError
from cmapkd.models.base import Model
from cmapkd.models.chat import HfChatProcessor
from cmapkd.models.config import ModelConfig
from cmapkd.models.cut_vocabulary import ABOUT_VOCABULARY, VocabularyChoice, cut_language
from cmapkd.models.families import Loader
from cmapkd.models.hf_vlm_build import processor_of
from cmapkd.models.hf_vlm_read import read_processor
from cmapkd.models.image_towers import ImagePartConfig, build_image_tower, rebuild_image_tower
from cmapkd.models.kept_tokens import texts_given
from cmapkd.models.lora import LoraConfig
from cmapkd.models.parts import refuse_empty
from cmapkd.models.storage import WEIGHTS, load_weights, read_weights
from cmapkd.models.vlm_language import Language, LanguageConfig, build_language, processor_for, rebuild_language
from cmapkd.models.vlm_model import LANGUAGE, PROCESSOR, AssembledVlm, joined
from cmapkd.models.vlm_tower import Projector, ProjectorKind, VisualTokens

_OF_LANGUAGE = ("embeddings", "language", "head")


class VlmOptions(Config):
    """The two halves, and the projector between them."""

    image: ImagePartConfig = Field(description="The image tower: a name, or a name with its settings.")
    text: LanguageConfig = Field(description="The language model, likewise.")
    level: str | None = Field(None, description="The level of the image tower that is read. None: its last one.")
    projector: ProjectorKind = Field("mlp", description="A norm, and behind it: linear, or mlp, two layers.")
    frozen: tuple[Literal["vision", "projector", "embeddings", "language", "head"], ...] = Field(
        (), description="Parts that never learn, and stay in eval mode."
    )
    lora: LoraConfig | None = Field(None, description="Low-rank adapters of the language model.")
    vocabulary: VocabularyChoice = Field("whole", description=ABOUT_VOCABULARY)
    max_tokens: int | None = Field(
        None, ge=8, description="Longest dialogue with its picture, in tokens. None: as long as the model takes."
    )


def build(rest: str, config: ModelConfig, captions: Iterable[str] | None) -> Model:  # noqa: ARG001  rest
    """`vlm:WORD`, where the word is a name of the user's own; `init: scratch` leaves both halves untrained."""
    if not {"image", "text"} <= config.options.keys():
        raise ConfigError(
            f"{config.name} is made of parts: name them as options.image and options.text, for example "
            "image: timm:resnet18/pretrained, text: hf:google/gemma-3-270m"
        )
    options = VlmOptions.from_mapping(config.options, where=f"options of {config.name}")
    if options.lora is not None and options.frozen:
        raise ConfigError(f"{config.name}: with lora nothing learns but what lora.learn names: leave out frozen")
    image, text = options.image, options.text
    if config.init == "scratch":
        image, text = image.model_copy(update={"init": "scratch"}), text.model_copy(update={"init": "scratch"})
    vision = VisualTokens(build_image_tower(image), options.level)
    language = build_language(text, where=config.name)
    if options.vocabulary == "texts":
        language = cut_language(language, texts_given(captions, config.name), name=config.name)
    model = assembled(vision, language, options.projector, name=config.name, max_tokens=options.max_tokens)
    random = {"vision": vision.tower.random, "projector": True, **dict.fromkeys(_OF_LANGUAGE, text.init == "scratch")}
    model.random_parts = tuple(part for part, names in model.parts.items() if names and random.get(part))
    if options.lora is not None:
        model.adapt(options.lora)
    parts, parameters = model.parts, dict(model.named_parameters())
    refuse_empty(parts, options.frozen, where=f"{config.name}: options.frozen")
    for name in frozenset().union(*(parts[part] for part in options.frozen)):
        parameters[name].requires_grad_(False)
    return model


def assembled(
    vision: VisualTokens, language: Language, kind: ProjectorKind, *, name: str, max_tokens: int | None = None
) -> AssembledVlm:
    """Both halves with an untrained projector between them.

    Args:
        max_tokens: longest dialogue with its picture; None: as long as the language model takes.
    """
    words = language.model.get_input_embeddings()
    with torch.no_grad():
        scale = float(words(torch.arange(min(4096, words.num_embeddings))).square().mean().sqrt())
    projector = Projector(kind, vision.width, words.embedding_dim, scale=scale)
    whole = joined(vision, projector, language.model, language.tokenizer.convert_tokens_to_ids(language.picture))
    native = processor_for(language, vision.tower.spec, vision.count)
    return _finished(whole, processor_of(native, whole.config, name=name, max_tokens=max_tokens), name)


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> Model:  # noqa: ARG001
    """A folder that `AssembledVlm.save` wrote; needs no network."""
    model = blank(folder, description["options"], str(description["name"]))
    load_weights(model, read_weights(folder / WEIGHTS), where=folder)
    return model


def blank(folder: Path, options: Mapping[str, Any], name: str) -> AssembledVlm:
    """A model with the settings that `AssembledVlm.write_settings` wrote and returned, and with random weights."""
    vision = VisualTokens(rebuild_image_tower(options["image"], folder), str(options["level"]))
    language = rebuild_language(folder / LANGUAGE)
    kind: ProjectorKind = "mlp" if options["projector"] == "mlp" else "linear"
    projector = Projector(kind, vision.width, language.get_input_embeddings().embedding_dim, scale=1.0)
    native = read_processor(str(folder / PROCESSOR), {}, name)
    picture = native.tokenizer.convert_tokens_to_ids(native.image_token)
    whole = joined(vision, projector, language, picture)
    processor = processor_of(native, whole.config, name=name, max_tokens=int(options["max_tokens"]))
    return _finished(whole, processor, name)


def _finished(whole: Any, processor: HfChatProcessor, name: str) -> AssembledVlm:
    return AssembledVlm(whole, processor=processor, name=name).eval()

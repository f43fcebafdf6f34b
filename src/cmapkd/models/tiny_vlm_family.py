"""Names after `tiny_vlm:`: small models that write, in the form of LLaVA; a trained one may ship with cmapkd."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cmapkd.config import Config, ConfigError, closest
from cmapkd.models import hf_family, vlm_family
from cmapkd.models.base import Model
from cmapkd.models.config import ModelConfig
from cmapkd.models.cut_vocabulary import ABOUT_VOCABULARY, VocabularyChoice, with_turns
from cmapkd.models.families import Loader
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.hf_vlm_build import processor_of
from cmapkd.models.image_towers import ImagePartConfig, build_image_tower
from cmapkd.models.kept_tokens import cut_tokenizer, kept_tokens, texts_given
from cmapkd.models.load import load_model
from cmapkd.models.lora import LoraConfig
from cmapkd.models.packaged import packaged_models
from cmapkd.models.tiny_vlm_words import END, START, byte_tokenizer, template_of
from cmapkd.models.vlm_language import Language
from cmapkd.models.vlm_tower import VisualTokens

_PICTURE = "<image>"


class TinyVlmOptions(Config):
    """Sizes of a small model that writes: a SigLIP vision tower, a projector of two layers, a Qwen2 language model.

    With `image` the sizes of the vision tower and of its pictures are not read.
    """

    image: ImagePartConfig | None = Field(
        None, description="A trained image tower by name, as tiny:scenes-teacher, in the place of an untrained one."
    )
    image_level: str | None = Field(None, description="The level of `image` that is read. None: the last but one.")
    image_size: int = Field(64, ge=8, le=1024, description="Side of the square picture, in pixels.")
    patch_size: int = Field(8, ge=2, description="Side of a patch, in pixels. Each patch is one visual token.")
    vision_width: int = Field(96, ge=8, description="Width of the vision tower.")
    vision_layers: int = Field(3, ge=1, description="Blocks of the vision tower.")
    vision_heads: int = Field(3, ge=1, description="Attention heads of the vision tower.")
    width: int = Field(128, ge=8, description="Width of the language model.")
    layers: int = Field(3, ge=1, description="Layers of the language model.")
    heads: int = Field(4, ge=2, multiple_of=2, description="Attention heads of the language model.")
    vocab_size: int = Field(1024, ge=300, description="Most tokens that a new tokenizer learns.")
    tokenizer: Literal["auto", "own"] = Field(
        "auto", description="auto: the teacher's, where it writes too; own: learned from the training texts."
    )
    vocabulary: VocabularyChoice = Field("whole", description=f"Of the teacher's tokenizer. {ABOUT_VOCABULARY}")
    lora: LoraConfig | None = Field(None, description="Low-rank adapters, of a model with trained weights.")
    max_tokens: int = Field(512, ge=16, description="Longest dialogue with its picture, in tokens.")


PRESETS = {
    "small": TinyVlmOptions(),
    "base": TinyVlmOptions(vision_width=192, vision_layers=5, vision_heads=6, width=256, layers=5, heads=8),
}


def build(rest: str, config: ModelConfig, captions: Iterable[str] | None, teacher: Model | None = None) -> HfVlm:
    """A preset with random weights, and the teacher's tokenizer or one learned from `captions`; or a packaged model.

    Raises:
        ConfigError: there is no such model, an option does not fit, or there is nothing to learn a tokenizer from.
    """
    packaged = packaged_models("tiny_vlm")
    if rest in packaged and config.init == "auto":
        return _trained(packaged[rest], config)
    if rest not in PRESETS:
        known = names()
        raise ConfigError(f"there is no model tiny_vlm:{rest}{closest(rest, known)}; known: {', '.join(known)}")
    values = {**PRESETS[rest].model_dump(), **config.options}
    options = TinyVlmOptions.from_mapping(values, where=f"options of tiny_vlm:{rest}")
    _check(options, rest)
    if isinstance(teacher, GenerativeModel) and options.tokenizer == "auto":
        native: Any = getattr(teacher.processor, "native", None)
        if native is None:
            raise ConfigError(f"the tokenizer of {teacher.name} is none of transformers: set the option tokenizer: own")
        tokens, picture = copy.deepcopy(native.tokenizer), teacher.vocabulary.image_id
        if options.vocabulary == "texts":
            kept = kept_tokens(tokens, with_turns(texts_given(captions, config.name)), name=teacher.name)
            tokens = cut_tokenizer(tokens, kept, name=teacher.name)
        end = native.tokenizer.convert_ids_to_tokens(teacher.vocabulary.end_ids[0])
        word, lead = native.tokenizer.convert_ids_to_tokens(picture), teacher.vocabulary.lead
        return _assemble(options, tokens, word, end, config.name, lead)
    if options.vocabulary == "texts":
        raise ConfigError(
            f"vocabulary: texts cuts the tokenizer of a teacher that writes, and tiny_vlm:{rest} learns one of its "
            "own: set vocab_size instead"
        )
    if captions is None:
        raise ConfigError(
            f"tiny_vlm:{rest} is untrained and learns its tokenizer from texts: give it data, or a teacher that writes"
        )
    tokens = byte_tokenizer(captions, size=options.vocab_size, special=(_PICTURE,), image_token=_PICTURE)
    return _assemble(options, tokens, _PICTURE, END, config.name)


def load(folder: Path, description: dict[str, Any], load_model: Loader) -> Model:
    """A folder that `HfVlm.save` wrote, which is one of transformers."""
    return hf_family.load(folder, description, load_model)


def names() -> list[str]:
    return [*PRESETS, *packaged_models("tiny_vlm")]


def _trained(folder: Path, config: ModelConfig) -> HfVlm:
    """A packaged model, under the name that it is asked by."""
    others = sorted(config.options.keys() - {"lora"})
    if others:
        raise ConfigError(f"{config.name} is trained: its sizes are fixed, options {others} do not apply")
    lora = TinyVlmOptions.from_mapping(config.options, where=f"options of {config.name}").lora
    model = load_model(folder)
    assert isinstance(model, HfVlm)
    model.name = config.name
    if lora is not None:
        model.adapt(lora)
    return model


def _check(options: TinyVlmOptions, rest: str) -> None:
    own = () if options.image is not None else (("image_size", "patch_size"), ("vision_width", "vision_heads"))
    problems = [
        f"{whole} {getattr(options, whole)} is no multiple of {part} {getattr(options, part)}"
        for whole, part in (*own, ("width", "heads"))
        if getattr(options, whole) % getattr(options, part)
    ]
    visual = 0 if options.image is not None else (options.image_size // options.patch_size) ** 2
    if visual + 16 > options.max_tokens:
        problems.append(f"max_tokens {options.max_tokens} leaves no room for words beside {visual} visual tokens")
    if (options.width // options.heads) % 2:
        problems.append(f"width {options.width} gives its {options.heads} heads an odd width")
    if problems:
        raise ConfigError(f"options of tiny_vlm:{rest}: {'; '.join(problems)}")


def _assemble(options: TinyVlmOptions, tokens: Any, picture: str, end: str, name: str, lead: str = "") -> HfVlm:
    made = (_untrained if options.image is None else _around_tower)(options, tokens, picture, end, name, lead)
    parts = [part for part, names in made.parts.items() if names]
    made.random_parts = tuple(part for part in parts if part != "vision" or options.image is None)
    if options.lora is not None:
        made.adapt(options.lora)
    return made


def _around_tower(options: TinyVlmOptions, tokens: Any, picture: str, end: str, name: str, lead: str) -> HfVlm:
    """An untrained language model behind an image tower of another model."""
    from transformers import Qwen2ForCausalLM

    assert options.image is not None
    tower = build_image_tower(options.image)
    # of a tower that pools its class token nothing trains the patches behind the last block (LLaVA reads -2, too)
    level = options.image_level or (tower.levels[-2].name if len(tower.levels) > 1 else None)
    vision = VisualTokens(tower, level)
    model = Qwen2ForCausalLM(_language(options, tokens, end)).float()
    return vlm_family.assembled(vision, Language(model, tokens, picture, lead), "mlp", name=name)


def _untrained(options: TinyVlmOptions, tokens: Any, picture: str, end: str, name: str, lead: str) -> HfVlm:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipImageProcessor

    side = options.image_size
    config = LlavaConfig(
        vision_config=_vision(options),
        text_config=_language(options, tokens, end),
        image_token_index=tokens.convert_tokens_to_ids(picture),
        image_seq_length=(side // options.patch_size) ** 2,
        vision_feature_select_strategy="full",  # SigLIP has no class token
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    start = START if START in tokens.get_vocab() else ""
    native = LlavaProcessor(
        SiglipImageProcessor(size={"height": side, "width": side}),
        tokens,
        patch_size=options.patch_size,
        vision_feature_select_strategy="full",
        image_token=picture,
        chat_template=template_of(picture, start=start, end=end, lead=lead),
    )
    processor = processor_of(native, config, name=name)
    return HfVlm(LlavaForConditionalGeneration(config).float(), processor=processor, name=name)


def _vision(options: TinyVlmOptions) -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=options.vision_width,
        intermediate_size=4 * options.vision_width,
        num_hidden_layers=options.vision_layers,
        num_attention_heads=options.vision_heads,
        image_size=options.image_size,
        patch_size=options.patch_size,
        vision_use_head=False,
    )


def _language(options: TinyVlmOptions, tokens: Any, end: str) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=max(tokens.get_vocab().values()) + 1,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads // 2,
        max_position_embeddings=options.max_tokens,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.convert_tokens_to_ids(end),
        bos_token_id=None,
        tie_word_embeddings=True,
    )

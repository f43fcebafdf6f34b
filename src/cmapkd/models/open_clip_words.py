"""An open_clip model with fewer words: its word table, the ids in its config, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

from cmapkd.config import ConfigError
from cmapkd.models.cut_words import cut_clip, cut_encoder, cut_native, cut_table, kept_of_clip
from cmapkd.models.open_clip_levels import has_transformers_text
from cmapkd.models.open_clip_tokenizer import OpenClipTokenizer


def cut_words(
    model: Any, config: dict[str, Any], tokenizer: OpenClipTokenizer, texts: Iterable[str], *, name: str
) -> tuple[OpenClipTokenizer, list[int]]:
    """Changes an open_clip model and its `model_cfg`; the new tokenizer, and the ids that stay of the old one.

    Raises:
        ConfigError: tokens cannot be left out of its tokenizer.
    """
    native = tokenizer.native
    if hasattr(native, "tokenizer"):
        if native.tokenizer_mode:
            raise ConfigError(
                f"{name} frames texts by tokenizer_mode {native.tokenizer_mode!r}, which names ids by itself: leave "
                "vocabulary: texts out"
            )
        smaller = copy(native)
        smaller.tokenizer, kept = cut_native(native.tokenizer, texts, name=name, clean=native.clean_fn)
    else:
        kept = kept_of_clip(native, texts, name=name)
        smaller = cut_clip(native, kept)
    if has_transformers_text(model):
        cut_encoder(model.text.transformer, kept, name=name)
    else:
        _cut_own_tower(model, config["text_cfg"], kept)
    config["text_cfg"]["vocab_size"] = len(kept)
    length, because = tokenizer.context_length, tokenizer.whole_because
    return OpenClipTokenizer(smaller, context_length=length, whole_because=because), kept


def _cut_own_tower(model: Any, config: dict[str, Any], kept: list[int]) -> None:
    """The text tower of open_clip, which may lie in the model itself."""
    tower, numbers = getattr(model, "text", model), {old: new for new, old in enumerate(kept)}
    cut_table(tower.token_embedding, kept)
    tower.vocab_size = len(kept)
    for key in ("pad_id", "eos_id"):
        if key in config:
            config[key] = numbers.get(config[key], 0)
        for attribute in (key, f"text_{key}"):
            if isinstance(getattr(tower, attribute, None), int):
                setattr(tower, attribute, numbers.get(getattr(tower, attribute), 0))

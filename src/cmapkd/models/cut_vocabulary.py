"""A language model with fewer tokens: the rows of its words table and head that a smaller tokenizer can write."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.models.hf_vlm_read import read_processor
from cmapkd.models.kept_tokens import cut_tokenizer, kept_tokens
from cmapkd.models.vlm_language import Language

VocabularyChoice = Literal["whole", "texts"]
ABOUT_VOCABULARY = (
    "whole: all tokens of the tokenizer. texts: those that the training texts need, control tokens and bytes; any "
    "other text has shorter tokens."
)


_MARK = "0123456789"  # in the place of a text


def texts_given(texts: Iterable[str] | None, name: str) -> Iterable[str]:
    """The texts whose tokens stay.

    Raises:
        ConfigError: there are none.
    """
    if texts is None:
        raise ConfigError(
            f"vocabulary: texts needs training texts, and {name} is given none: leave the option out here"
        )
    return texts


def cut_to_texts(model: Any, native: Any, texts: Iterable[str], *, name: str, lead: str = "") -> tuple[Any, Any]:
    """transformers' model with its head, and its processor, with the tokens that the texts need.

    The model is another one, with the same weights but for the rows that are left out.

    Args:
        texts: are read as an answer and within a dialogue.
        lead: what stands before each answer.
    Raises:
        ConfigError: tokens cannot be left out of such a tokenizer.
    """
    kept = kept_tokens(native.tokenizer, _in_dialogues(texts, native, lead), name=name)
    native = copy.deepcopy(native)
    native.tokenizer = cut_tokenizer(native.tokenizer, kept, name=name)
    with TemporaryDirectory() as folder:  # processors keep ids beside their tokenizer, and find them when they are read
        native.save_pretrained(folder)
        native = read_processor(str(Path(folder)), {}, name)
    return cut_rows(model, kept), native


def cut_language(language: Language, texts: Iterable[str], *, name: str) -> Language:
    """A language model that is to be joined with an image tower, likewise."""
    kept = kept_tokens(language.tokenizer, with_turns(texts), name=name)
    tokenizer = cut_tokenizer(language.tokenizer, kept, name=name)
    return replace(language, model=cut_rows(language.model, kept), tokenizer=tokenizer)


def cut_rows(model: Any, kept: Sequence[int]) -> Any:
    """The same model with these rows of its words table and head alone, and with their new numbers in its config."""
    numbers = {old: new for new, old in enumerate(kept)}
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    table = model.get_input_embeddings().weight
    for each in _configs(config):
        _renumber(each, numbers)
        if getattr(each, "vocab_size", None) == len(table):
            each.vocab_size = len(kept)
    config.get_text_config().vocab_size = len(kept)
    _renumber(generation, numbers)
    rows = torch.tensor(list(kept), dtype=torch.long)
    words = [model.get_input_embeddings().weight, *(p for p in model.lm_head.parameters())]
    cut = {id(parameter) for parameter in words}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {
        key: value[rows] if id(parameters.get(key)) in cut else value for key, value in model.state_dict().items()
    }
    smaller = type(model)(config).to(table.dtype)
    smaller.load_state_dict(state)
    smaller.tie_weights()
    smaller.generation_config = generation
    smaller.set_attn_implementation(model.config._attn_implementation)
    return smaller.train(model.training)


def with_turns(texts: Iterable[str]) -> Iterator[str]:
    """The texts, and what the templates of `tiny_vlm_words` write around turns."""
    yield from ("user\n", "assistant\n", "model\n", "system\n", "\n")
    yield from texts


def _in_dialogues(texts: Iterable[str], native: Any, lead: str) -> Iterator[str]:
    """Each text alone, as an answer, and as both turns of a dialogue in the model's template."""
    said, shown = {"type": "text", "text": _MARK}, {"type": "image"}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [shown, said]},
        {"role": "assistant", "content": [said]},
    ]
    frame = native.apply_chat_template(turns, tokenize=False)
    yield native.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    for text in texts:
        yield lead + text
        yield frame.replace(_MARK, text)


def _configs(config: Any) -> list[Any]:
    """A config and those inside it."""
    inside = [each for each in vars(config).values() if hasattr(each, "to_dict") and hasattr(each, "model_type")]
    return [config, *(deeper for each in inside for deeper in _configs(each))]


def _renumber(settings: Any, numbers: Mapping[int, int]) -> None:
    """New ids of tokens, in place; None for those that the tokenizer does not have."""
    for key, value in list(vars(settings).items()):
        if not key.endswith(("_token_id", "_token_index", "_token_ids")) or value is None:
            continue
        if isinstance(value, list | tuple):
            setattr(settings, key, [numbers[old] for old in value if old in numbers])
        else:
            setattr(settings, key, numbers.get(int(value)))

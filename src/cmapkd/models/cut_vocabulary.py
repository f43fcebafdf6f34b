"""A language model with fewer tokens: the rows of its words table and head that a smaller tokenizer can write."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from cmapkd.models.cut_words import configs_in, renumber
from cmapkd.models.hf_vlm_read import read_processor
from cmapkd.models.kept_tokens import cut_tokenizer, kept_tokens
from cmapkd.models.vlm_language import Language

VocabularyChoice = Literal["whole", "texts"]
ABOUT_VOCABULARY = (
    "whole: all tokens of the tokenizer. texts: those that the training texts need, control tokens and bytes; any "
    "other text has shorter tokens."
)


_MARK = "0123456789"  # in the place of a text


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
    for each in configs_in(config):
        renumber(each, numbers)
        if getattr(each, "vocab_size", None) == len(table):
            each.vocab_size = len(kept)
    config.get_text_config().vocab_size = len(kept)
    renumber(generation, numbers)
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

"""A text tower with fewer words: the rows of its word table that the tokens of some texts need, and their tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import nn

from cmapkd.config import ConfigError
from cmapkd.models.kept_pieces import merged_parts
from cmapkd.models.kept_tokens import cut_tokenizer, kept_tokens

_OFFSET_PLACES = ("roberta", "xlm-roberta", "camembert", "mpnet")  # they count places from the id of the padding
_WORD_END = "</w>"


def cut_native(
    native: Any, texts: Iterable[str], *, name: str, clean: Callable[[str], str] | None = None
) -> tuple[Any, list[int]]:
    """A tokenizer of transformers that knows the tokens of the texts, and the ids that they had.

    Args:
        clean: what texts go through before this tokenizer reads them.
    Raises:
        ConfigError: tokens cannot be left out of it.
    """
    cleaned = texts if clean is None else map(clean, texts)
    kept = kept_tokens(native, cleaned, name=name, writes=False)
    return cut_tokenizer(native, kept, name=name, writes=False), kept


def kept_of_clip(native: Any, texts: Iterable[str], *, name: str) -> list[int]:
    """Ids of open_clip's own tokenizer that stay: of the texts, their parts, the bytes and the control tokens.

    Raises:
        ConfigError: it is none of open_clip's byte-pair encodings.
    """
    if not hasattr(native, "bpe_ranks"):
        raise ConfigError(
            f"vocabulary: texts leaves tokens out of CLIP's tokenizer and of transformers' ones, and {name} has a "
            f"{type(native).__name__}: leave the option out"
        )
    ids, ranks = native.encoder, native.bpe_ranks
    needed = {number for text in texts for number in native.encode(text)}
    inside = {part for number in needed for part in merged_parts(native.decoder[number], ranks, _WORD_END)}
    letters = {ids[letter + end] for letter in native.byte_encoder.values() for end in ("", _WORD_END)}
    return sorted({*native.all_special_ids, *needed, *letters, *(ids[part] for part in inside if part in ids)})


def cut_clip(native: Any, kept: Sequence[int]) -> Any:
    """open_clip's own tokenizer with the kept ids alone, numbered anew in their order."""
    numbers = {old: new for new, old in enumerate(kept)}
    smaller = copy(native)
    smaller.encoder = {piece: numbers[old] for piece, old in native.encoder.items() if old in numbers}
    smaller.decoder = {number: piece for piece, number in smaller.encoder.items()}
    known = smaller.encoder
    smaller.bpe_ranks = {
        pair: rank for pair, rank in native.bpe_ranks.items() if {*pair, "".join(pair)} <= known.keys()
    }
    smaller.all_special_ids = [numbers[old] for old in native.all_special_ids]
    smaller.sot_token_id, smaller.eot_token_id = numbers[native.sot_token_id], numbers[native.eot_token_id]
    special = [native.decoder[old] for old in native.all_special_ids]
    smaller.cache, smaller.vocab_size = {piece: piece for piece in special}, len(kept)
    return smaller


def cut_table(table: nn.Embedding, kept: Sequence[int]) -> None:
    """Leaves the other rows out, in place.

    Raises:
        ConfigError: the table has no such rows.
    """
    if kept[-1] >= len(table.weight):
        raise ConfigError(
            f"the tokenizer has the id {kept[-1]}, and the word table {len(table.weight)} rows: they do not belong "
            "together, so vocabulary: texts cannot cut them"
        )
    rows = torch.tensor(list(kept), dtype=torch.long)
    table.weight = nn.Parameter(table.weight.detach()[rows].clone(), requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(rows)
    if table.padding_idx is not None:
        numbers = {old: new for new, old in enumerate(kept)}
        table.padding_idx = numbers.get(table.padding_idx)


def cut_encoder(model: Any, kept: Sequence[int], *, name: str) -> None:
    """A text encoder of transformers, in place: its word table, and the ids in its config.

    Raises:
        ConfigError: it counts places from the id of its padding, which would be another one.
    """
    numbers, config = {old: new for new, old in enumerate(kept)}, model.config
    padding = getattr(config, "pad_token_id", None)
    if config.model_type in _OFFSET_PLACES and padding is not None and numbers.get(padding) != padding:
        raise ConfigError(
            f"{name} counts places from the id of its padding, {padding}, which vocabulary: texts would change: leave "
            "the option out"
        )
    cut_table(model.get_input_embeddings(), kept)
    for each in configs_in(config):
        renumber(each, numbers)
    config.vocab_size = len(kept)


def configs_in(config: Any) -> list[Any]:
    """A config of transformers and those inside it."""
    inside = [each for each in vars(config).values() if hasattr(each, "to_dict") and hasattr(each, "model_type")]
    return [config, *(deeper for each in inside for deeper in configs_in(each))]


def renumber(settings: Any, numbers: Mapping[int, int]) -> None:
    """New ids of tokens, in place; None for those that the tokenizer does not have."""
    for key, value in list(vars(settings).items()):
        if not key.endswith(("_token_id", "_token_index", "_token_ids")) or value is None:
            continue
        if isinstance(value, list | tuple):
            setattr(settings, key, [numbers[old] for old in value if old in numbers])
        else:
            setattr(settings, key, numbers.get(int(value)))

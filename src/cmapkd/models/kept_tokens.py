"""A smaller tokenizer out of a larger one: the tokens that some texts need, the control tokens and the bytes.

These texts, and all others whose tokens are kept, have the same tokens as before, see `kept_pieces`. Any other text
has shorter ones, down to bytes or letters, or the unknown token where the tokenizer has no bytes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from cmapkd.config import ConfigError
from cmapkd.models.kept_pieces import (
    KINDS,
    byte_pieces,
    cut_model,
    inside_unknown,
    merged_parts,
    merges_of,
    pieces_of,
    plain_letters,
)

_AT_ONCE = 1000  # texts that are tokenised at a time


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


def kept_tokens(tokenizer: Any, texts: Iterable[str], *, name: str, writes: bool = True) -> list[int]:
    """Ids that stay, ascending.

    Args:
        tokenizer: a fast one of transformers. Of a model that writes: of byte-pair encoding that knows all bytes.
        texts: whose tokens stay.
        name: of the model, for messages.
        writes: whether the model writes. One that only reads may have an unknown token.
    Raises:
        ConfigError: the tokenizer is of another kind.
    """
    backend = _description(tokenizer, name, writes=writes)
    model = backend["model"]
    ids, suffix = pieces_of(model), model.get("end_of_word_suffix") or ""
    pieces = {number: piece for piece, number in ids.items()}
    added = {int(token["id"]) for token in backend["added_tokens"]}
    unknown = _unknown(model, ids)
    needed: set[int] = set()
    for batch in _batches(texts):
        rows = tokenizer(batch, add_special_tokens=False)["input_ids"]
        needed.update(number for row in rows for number in row)
        if model["type"] == "WordPiece":
            lost = (text for text, row in zip(batch, rows, strict=True) if unknown & set(row))
            needed.update(number for text in lost for number in inside_unknown(_words(tokenizer, text), model))
    kept = added | needed | unknown
    if model["type"] == "BPE" or model.get("byte_fallback"):
        kept |= byte_pieces(ids, suffix)
    if model["type"] == "BPE":
        ranks = {pair: rank for rank, pair in enumerate(merges_of(model))}
        inside = {part for number in needed - added for part in merged_parts(pieces[number], ranks, suffix)}
        kept |= {ids[part] for part in inside if part in ids}
    else:
        kept |= plain_letters(model)
    if model["type"] == "Unigram":
        kept.add(min(range(len(model["vocab"])), key=lambda number: model["vocab"][number][1]))
    return sorted(kept)


def cut_tokenizer(tokenizer: Any, kept: Sequence[int], *, name: str, writes: bool = True) -> Any:
    """The tokenizer that knows the kept ids alone, numbered anew in their order.

    Raises:
        ConfigError: the tokenizer is of another kind, or a step of it names tokens in a way that is not known.
    """
    from tokenizers import Tokenizer

    backend, numbers = _description(tokenizer, name, writes=writes), {old: new for new, old in enumerate(kept)}
    backend["model"] = cut_model(backend["model"], kept)
    backend["added_tokens"] = [{**token, "id": numbers[token["id"]]} for token in backend["added_tokens"]]
    backend["truncation"] = backend["padding"] = None
    backend["post_processor"] = _renumbered(backend["post_processor"], numbers, name)
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return smaller


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    left = iter(texts)
    while batch := list(islice(left, _AT_ONCE)):
        yield batch


def _unknown(model: Mapping[str, Any], ids: Mapping[str, int]) -> set[int]:
    """The id of the unknown token, where there is one."""
    if model["type"] == "Unigram":
        return set() if model.get("unk_id") is None else {int(model["unk_id"])}
    unknown = str(model.get("unk_token"))
    return {ids[unknown]} if unknown in ids else set()


def _words(tokenizer: Any, text: str) -> Iterator[str]:
    """The words that the tokenizer's model is given, each by itself."""
    backend = tokenizer.backend_tokenizer
    normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    split = [(normal, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(normal)
    yield from (word for word, _ in split)


def _description(tokenizer: Any, name: str, *, writes: bool) -> dict[str, Any]:
    """What the backend is made of, refused unless tokens can be left out of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = found.get("model") or {}
    kind = model.get("type") or type(tokenizer).__name__
    framed = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if writes and (kind != "BPE" or framed):
        raise ConfigError(
            f"vocabulary: texts leaves tokens out of byte-pair encodings, and the tokenizer of {name} is {kind}: leave "
            "the option out"
        )
    if kind not in KINDS or (kind == "BPE" and model.get("continuing_subword_prefix")):
        raise ConfigError(
            f"vocabulary: texts leaves tokens out of fast tokenizers ({', '.join(KINDS)}), and the tokenizer of {name} "
            f"is {kind}: leave the option out"
        )
    if kind == "BPE" and len(byte_pieces(model["vocab"], model.get("end_of_word_suffix") or "")) < 256:
        raise ConfigError(
            f"the tokenizer of {name} does not know all bytes, so that texts would be lost with its tokens: leave "
            "vocabulary: texts out"
        )
    return found


def _renumbered(step: Any, numbers: Mapping[int, int], name: str) -> Any:
    """The step that puts control tokens around a text, with their new ids."""
    kind = None if step is None else step["type"]
    if kind in (None, "ByteLevel"):
        return step
    if kind == "Sequence":
        return {**step, "processors": [_renumbered(each, numbers, name) for each in step["processors"]]}
    if kind == "TemplateProcessing":
        special = {
            token: {**each, "ids": [numbers[old] for old in each["ids"]]}
            for token, each in step["special_tokens"].items()
        }
        return {**step, "special_tokens": special}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {**step, **{end: [step[end][0], numbers[step[end][1]]] for end in ("sep", "cls")}}
    raise ConfigError(f"the tokenizer of {name} ends with {kind}, which is not known here: leave out vocabulary: texts")

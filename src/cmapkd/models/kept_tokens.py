"""A smaller tokenizer out of a larger one: the tokens that some texts need, the control tokens and the bytes.

Byte-pair encoding applies its merges in a fixed order. A token that the texts need is made of smaller ones, which are
kept with it. Then every merge that the whole tokenizer applies to these texts is there, in its order. So these texts,
and all others whose tokens are kept, have the same tokens as before. Any other text has shorter ones, down to bytes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from cmapkd.config import ConfigError

_AT_ONCE = 1000  # texts that are tokenised at a time


def kept_tokens(tokenizer: Any, texts: Iterable[str], *, name: str) -> list[int]:
    """Ids that stay, ascending.

    Args:
        tokenizer: of transformers, of byte-pair encoding that knows all bytes.
        texts: whose tokens stay.
        name: of the model, for messages.
    Raises:
        ConfigError: the tokenizer is of another kind.
    """
    backend = _description(tokenizer, name)
    ids: dict[str, int] = backend["model"]["vocab"]
    pieces = {number: piece for piece, number in ids.items()}
    added = {int(token["id"]) for token in backend["added_tokens"]}
    needed: set[int] = set()
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _AT_ONCE:
            needed.update(_ids(tokenizer, batch))
            batch.clear()
    needed.update(_ids(tokenizer, batch))
    ranks = {pair: rank for rank, pair in enumerate(_merges(backend))}
    inside = {part for number in needed - added for part in _parts(pieces[number], ranks)}
    unknown = backend["model"].get("unk_token")
    kept = added | needed | _byte_ids(ids) | {ids[part] for part in inside if part in ids}
    return sorted(kept | ({ids[unknown]} if unknown in ids else set()))


def cut_tokenizer(tokenizer: Any, kept: Sequence[int], *, name: str) -> Any:
    """The tokenizer that writes the kept ids alone, numbered anew in their order.

    Raises:
        ConfigError: the tokenizer is of another kind, or a step of it names tokens in a way that is not known.
    """
    from tokenizers import Tokenizer

    backend, numbers = _description(tokenizer, name), {old: new for new, old in enumerate(kept)}
    model = backend["model"]
    merges = _merges(backend)
    model["vocab"] = {piece: numbers[old] for piece, old in model["vocab"].items() if old in numbers}
    known = model["vocab"]
    model["merges"] = [[a, b] for a, b in merges if a in known and b in known and a + b in known]
    backend["added_tokens"] = [{**token, "id": numbers[token["id"]]} for token in backend["added_tokens"]]
    backend["truncation"] = backend["padding"] = None
    backend["post_processor"] = _renumbered(backend["post_processor"], numbers, name)
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return smaller


def _description(tokenizer: Any, name: str) -> dict[str, Any]:
    """What the backend is made of, refused unless tokens can be left out of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = found.get("model") or {}
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ConfigError(
            f"vocabulary: texts leaves tokens out of byte-pair encodings, and the tokenizer of {name} is "
            f"{model.get('type') or type(tokenizer).__name__}: leave the option out"
        )
    if len(_byte_ids(model["vocab"])) < 256:
        raise ConfigError(
            f"the tokenizer of {name} does not know all bytes, so that texts would be lost with its tokens: leave "
            "vocabulary: texts out"
        )
    return found


def _byte_ids(ids: Mapping[str, int]) -> set[int]:
    """Ids of the tokens of a byte, in the form of SentencePiece or of GPT-2."""
    from tokenizers import pre_tokenizers

    fallback = [ids[piece] for byte in range(256) if (piece := f"<0x{byte:02X}>") in ids]
    letters = [ids[piece] for piece in pre_tokenizers.ByteLevel.alphabet() if piece in ids]
    return set(fallback if len(fallback) == 256 else letters)


def _ids(tokenizer: Any, texts: Sequence[str]) -> set[int]:
    if not texts:
        return set()
    return {number for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for number in row}


def _merges(backend: Mapping[str, Any]) -> list[tuple[str, str]]:
    """In their order; older files write a pair as one text."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in backend["model"]["merges"])
    return [(str(a), str(b)) for a, b in pairs]


def _parts(piece: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Every token that comes up while the merges make this one, itself too."""
    symbols, seen = list(piece), list(piece)
    while len(symbols) > 1:
        places = {at: ranks.get(pair) for at, pair in enumerate(pairwise(symbols))}
        found = [(rank, at) for at, rank in places.items() if rank is not None]
        if not found:
            break
        _, at = min(found)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        seen.append(symbols[at])
    return seen


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
    raise ConfigError(f"the tokenizer of {name} ends with {kind}, which is not known here: leave out vocabulary: texts")

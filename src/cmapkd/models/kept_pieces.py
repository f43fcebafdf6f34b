"""Which pieces of a tokenizer must stay so that some texts keep their tokens, by the kind of its model.

Byte-pair encoding applies its merges in a fixed order. A token that the texts need is made of smaller ones, which are
kept with it. Then every merge that the whole tokenizer applies to these texts is there, in its order.

WordPiece takes the longest piece that fits, again and again. Among fewer pieces the one that was taken is still the
longest. A word that ends as unknown keeps the pieces that were taken before nothing fitted.

Unigram takes the likeliest way through a text. Among fewer pieces it is still the likeliest. What an unknown letter
costs follows from the least likely piece, which is kept.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")
_LETTERS = frozenset(string.printable)
_SPACES = ("\u2581", "\u0120")  # how SentencePiece and GPT-2 write a space in front of a word


def merged_parts(piece: str, ranks: Mapping[tuple[str, str], int], suffix: str = "") -> list[str]:
    """Every token that comes up while the merges make this one, itself too.

    Args:
        suffix: what stands behind the last letter of a word (CLIP's `</w>`).
    """
    symbols = list(piece.removesuffix(suffix))
    if suffix and piece.endswith(suffix) and symbols:
        symbols[-1] += suffix
    seen = list(symbols)
    while len(symbols) > 1:
        places = {at: ranks.get(pair) for at, pair in enumerate(pairwise(symbols))}
        found = [(rank, at) for at, rank in places.items() if rank is not None]
        if not found:
            break
        _, at = min(found)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        seen.append(symbols[at])
    return seen


def merges_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """In their order; older files write a pair as one text."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(str(a), str(b)) for a, b in pairs]


def pieces_of(model: Mapping[str, Any]) -> dict[str, int]:
    """Ids of all pieces, of a tokenizer's model as `tokenizers` describes it."""
    if model["type"] == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def byte_pieces(ids: Mapping[str, int], suffix: str = "") -> set[int]:
    """Ids of the tokens of a byte, in the form of SentencePiece or of GPT-2; fewer than 256 where some are missing."""
    from tokenizers import pre_tokenizers

    fallback = [ids[piece] for byte in range(256) if (piece := f"<0x{byte:02X}>") in ids]
    if len(fallback) == 256:
        return set(fallback)
    forms = ("", suffix) if suffix else ("",)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return {ids[letter + form] for form in forms for letter in alphabet if letter + form in ids}


def plain_letters(model: Mapping[str, Any]) -> set[int]:
    """Ids of the pieces that are one printable ASCII letter, digit or mark, so that other words can be spelled."""
    prefix = model.get("continuing_subword_prefix") or ""
    found = {number for piece, number in pieces_of(model).items() if piece.removeprefix(prefix) in _LETTERS}
    spaced = {number for piece, number in pieces_of(model).items() if piece[:1] in _SPACES and piece[1:] in _LETTERS}
    return found | spaced | {number for piece, number in pieces_of(model).items() if piece in _SPACES}


def inside_unknown(words: Iterable[str], model: Mapping[str, Any]) -> Iterator[int]:
    """Ids of the pieces that WordPiece takes of a word before it finds that it does not know the rest."""
    ids, prefix = model["vocab"], model["continuing_subword_prefix"]
    for word in words:
        at = 0
        while at < len(word) <= model["max_input_chars_per_word"]:
            start = prefix if at else ""
            end = next((end for end in range(len(word), at, -1) if start + word[at:end] in ids), None)
            if end is None:
                break
            yield ids[start + word[at:end]]
            at = end


def cut_model(model: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A tokenizer's model with the kept ids alone, numbered anew in their order."""
    numbers = {old: new for new, old in enumerate(kept)}
    if model["type"] == "Unigram":
        unknown = model.get("unk_id")
        scores = [model["vocab"][number] for number in kept if number < len(model["vocab"])]
        return {**model, "vocab": scores, "unk_id": None if unknown is None else numbers[unknown]}
    known = {piece: numbers[old] for piece, old in model["vocab"].items() if old in numbers}
    cut = {**model, "vocab": known}
    if model["type"] == "BPE":
        merges = merges_of(model)
        cut["merges"] = [[a, b] for a, b in merges if a in known and b in known and a + b in known]
    return cut

"""Where open_clip's tokens stand in the text as it was given: its tokenizers clean texts first and keep no offsets.

Cleaning (ftfy, entities, white space, case, and for SigLIP punctuation) is undone word by word. A word that it left as
long as it was, its punctuation not counted, stands where it stood. The tokens of a word that grew or shrank have no
span, nor has any of a text that gained or lost a word.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

Span = tuple[int, int]
_WORD = re.compile(r"\S+")
_APART = re.compile(r"[^\s_]+")  # words where `_` is a space
_PUNCTUATION = frozenset(string.punctuation)
_NO_SPAN: Span = (0, 0)
_MOST_KNOWN = 100_000  # words remembered, some 30 MB


class SpanFinder(Protocol):
    """The spans of tokenised texts. Picklable: it works inside data workers."""

    def __call__(
        self, texts: Sequence[str], cleaned: Sequence[str], context_length: int
    ) -> Int[Tensor, "batch context_length 2"]:
        """Start and end in `texts` of each token of `cleaned`, 0 0 where there is none."""
        ...


def moved_spans(
    spans: Sequence[Sequence[Sequence[int]]], texts: Sequence[str], cleaned: Sequence[str], *, canonical: bool
) -> Int[Tensor, "batch length 2"]:
    """Spans in cleaned texts as spans in the texts as they were given.

    Args:
        canonical: whether cleaning took out punctuation, and made `_` a space.
    """
    moved = [
        _moved(row, text, clean, canonical=canonical) for row, text, clean in zip(spans, texts, cleaned, strict=True)
    ]
    return torch.from_numpy(np.array(moved, dtype=np.int64).reshape(len(texts), -1, 2))


def span_finder(tokenizer: Any) -> SpanFinder | None:
    """What finds the spans of one of open_clip's tokenizers.

    None for those that drop tokens at random, frame texts in their own way, or are slow ones of transformers.
    """
    if not hasattr(tokenizer, "clean_fn"):
        return None
    if hasattr(tokenizer, "tokenizer"):
        known = tokenizer.tokenizer.is_fast and not tokenizer.tokenizer_mode
        return TransformersSpans(tokenizer.tokenizer, canonical=_is_canonical(tokenizer)) if known else None
    return None if tokenizer.reduction_fn is not None else BytePairSpans(tokenizer)


class BytePairSpans:
    """For open_clip's `SimpleTokenizer`: CLIP's byte-pair encoding of lower-cased words."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._canonical = tokenizer, _is_canonical(tokenizer)
        self._known: dict[str, tuple[Span, ...]] = {}  # the tokenizer itself remembers all it has seen

    def __call__(
        self, texts: Sequence[str], cleaned: Sequence[str], context_length: int
    ) -> Int[Tensor, "batch context_length 2"]:
        spans = np.zeros((len(texts), context_length, 2), dtype=np.int64)
        for row, text, clean in zip(spans, texts, cleaned, strict=True):
            found = self._text(text, clean)[: context_length - 2]  # between the start and the end token
            if found:
                row[1 : 1 + len(found)] = found
        return torch.from_numpy(spans)

    def _text(self, text: str, cleaned: str) -> list[Span]:
        words, places = cleaned.split(), _words(text, canonical=self._canonical)
        if len(words) != len(places):
            return []
        found: list[Span] = []
        for word, characters in zip(words, places, strict=True):
            pieces = self._known.get(word) or self._pieces(word)
            if len(word) == len(characters):
                found.extend([(characters[first], characters[last - 1] + 1) for first, last in pieces])
            else:
                found.extend([_NO_SPAN] * len(pieces))
        return found

    def _pieces(self, word: str) -> tuple[Span, ...]:
        """Characters of each token of a word without white space; a character of several tokens belongs to each."""
        native, pieces = self._tokenizer, []
        for match in native.pat.finditer(word):
            text = match.group()
            place = [match.start() + n for n, character in enumerate(text) for _ in character.encode()]  # of each byte
            begin = 0
            for piece in native.bpe("".join(native.byte_encoder[byte] for byte in text.encode())).split(" "):
                end = begin + len(piece.removesuffix("</w>"))
                pieces.append((place[begin], place[end - 1] + 1))
                begin = end
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[word] = tuple(pieces)
        return self._known[word]


class TransformersSpans:
    """For open_clip's `HFTokenizer` over a fast transformers tokenizer, which tells its spans in the cleaned text."""

    def __init__(self, tokenizer: Any, *, canonical: bool) -> None:
        self._tokenizer, self._canonical = tokenizer, canonical

    def __call__(
        self, texts: Sequence[str], cleaned: Sequence[str], context_length: int
    ) -> Int[Tensor, "batch context_length 2"]:
        encoded = self._tokenizer(
            list(cleaned), max_length=context_length, padding="max_length", truncation=True, return_offsets_mapping=True
        )
        return moved_spans(encoded["offset_mapping"], texts, cleaned, canonical=self._canonical)


def _is_canonical(tokenizer: Any) -> bool:
    """Whether one of open_clip's tokenizers takes out punctuation before it splits texts."""
    return bool(tokenizer.clean_fn("_a!") == "a")


def _words(text: str, *, canonical: bool) -> list[list[int]]:
    """Of each word that cleaning leaves of a text, where its characters stand."""
    if not canonical:
        return [[*range(*match.span())] for match in _WORD.finditer(text)]
    words = ([n for n in range(*match.span()) if text[n] not in _PUNCTUATION] for match in _APART.finditer(text))
    return [word for word in words if word]


def _moved(spans: Sequence[Sequence[int]], text: str, cleaned: str, *, canonical: bool) -> list[Span]:
    """Spans in `cleaned` as spans in `text`, without the white space that some tokens begin with."""
    before = [[*range(*match.span())] for match in _WORD.finditer(cleaned)]
    after = _words(text, canonical=canonical)
    place: dict[int, int] = {}
    if len(before) == len(after):
        for ours, theirs in zip(before, after, strict=True):
            if len(ours) == len(theirs):
                place.update(zip(ours, theirs, strict=True))
    moved: list[Span] = []
    for start, end in spans:
        characters = [place[n] for n in range(start, end) if n in place]
        moved.append((characters[0], characters[-1] + 1) if characters else _NO_SPAN)
    return moved

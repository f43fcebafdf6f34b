"""The bytes that each token of a tokenizer stands for, and which tokens of two tokenizers stand for the same ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cmapkd.config import ConfigError

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"  # of SentencePiece, in the place of a space


@dataclass(frozen=True)
class Spelling:
    """What the tokens of one model stand for.

    Attributes:
        pieces: by id; empty for control tokens, such as the end of an answer.
        lead: what the model writes before each answer, and is no part of it; mostly nothing.
        end_id: of the token behind each answer.
    """

    pieces: tuple[bytes, ...]
    lead: bytes
    end_id: int

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.pieces))

    def text(self, ids: Sequence[int]) -> bytes:
        """What tokens stand for together."""
        return b"".join(self.pieces[number] for number in ids)


def token_bytes(tokenizer: Any, *, size: int, control: frozenset[int], name: str) -> tuple[bytes, ...]:
    """What each token stands for within a text, by id.

    Args:
        tokenizer: of transformers, with a backend of the `tokenizers` library.
        size: how many tokens there are; an id that names none stands for nothing.
        control: ids that stand for no text.
        name: of the model, for the message.
    Raises:
        ConfigError: the tokenizer's tokens are neither bytes (GPT-2, Qwen, SmolLM) nor SentencePiece's (Llama, Gemma).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else json.loads(backend.to_str())["decoder"]
    kinds = [] if decoder is None else [each["type"] for each in decoder.get("decoders", [decoder])]
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    if "ByteLevel" in kinds:
        table = _bytes_by_letter()
    elif kinds and (kinds[0] == "Metaspace" or "ByteFallback" in kinds):
        table = None
    else:
        raise ConfigError(
            f"the bytes of the tokens of {name} are not known: its tokenizer decodes by {kinds or 'rules of its own'}. "
            "Byte-level tokenizers (Qwen, SmolLM, GPT-2) and SentencePiece's (Llama, Gemma) can be read"
        )
    made = []
    for number, piece in enumerate(tokenizer.convert_ids_to_tokens(range(size))):
        if piece is None or number in control:
            made.append(b"")
        elif number in added:
            made.append(added[number].encode())
        else:
            made.append(_of_sentencepiece(piece) if table is None else _of_letters(piece, table))
    return tuple(made)


@dataclass(frozen=True)
class TokenPairs:
    """Tokens of a teacher and of a student that stand for the same text.

    Attributes:
        teacher, student: Int[pairs], ids.
    """

    teacher: Int[Tensor, " pairs"]
    student: Int[Tensor, " pairs"]

    def __len__(self) -> int:
        return len(self.teacher)


def paired_tokens(teacher: Spelling, student: Spelling, *, first: bool = False) -> TokenPairs:
    """Tokens with the same bytes, and both end tokens.

    Args:
        first: of an answer, where each model writes its lead with the text: tokens are compared behind it.
    """
    ours, theirs = (_by_text(each, each.lead if first else b"") for each in (student, teacher))
    common = sorted(ours.keys() & theirs.keys(), key=lambda text: ours[text])
    pairs = [(theirs[text], ours[text]) for text in common] + [(teacher.end_id, student.end_id)]
    ids = torch.tensor(pairs, dtype=torch.long)
    return TokenPairs(ids[:, 0].contiguous(), ids[:, 1].contiguous())


def _by_text(spelling: Spelling, lead: bytes) -> dict[bytes, int]:
    """Ids by their text behind the lead. A token of its own hides the byte that stands in for it (SentencePiece)."""
    pieces = enumerate(spelling.pieces)
    return {text[len(lead) :]: number for number, text in pieces if text.startswith(lead) and len(text) > len(lead)}


def _of_sentencepiece(piece: str) -> bytes:
    found = _FALLBACK.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else piece.replace(_SPACE, " ").encode()


def _of_letters(piece: str, table: Mapping[str, int]) -> bytes:
    if any(letter not in table for letter in piece):
        return piece.encode()  # not written by the byte-level step
    return bytes(table[letter] for letter in piece)


def _bytes_by_letter() -> dict[str, int]:
    """The letters by which GPT-2's tokenizer writes bytes: printable ones as they are, the others from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [*map(chr, plain), *(chr(256 + number) for number in range(len(others)))]
    return dict(zip(letters, [*plain, *others], strict=True))

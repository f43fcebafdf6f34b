"""The row of a teacher that writes: for each token of the answer its likeliest tokens, and all others as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmapkd.cache.files import CacheError
from cmapkd.cache.rows import CHECK, Layout, as_in_training
from cmapkd.cache.token_fidelity import TokenFidelity
from cmapkd.data.dialogues import ChatInput
from cmapkd.features.top_tokens import ROWS, StoredTokens, pack, top_tokens, unpack
from cmapkd.methods.generative import TopRequest
from cmapkd.models import FrozenTeacher
from cmapkd.models.shared_vocabulary import cut_head
from cmapkd.models.token_types import TokenNeeds, TopTokens

TOKENS = "tokens"
"""The kind of such a layout, in `cache.json`."""
SMALL_IDS = 2**16  # vocabularies up to this size have ids of two bytes
_STORES = {"fp16": (torch.float16, "<f2"), "fp32": (torch.float32, "<f4")}
_OF_TOKENS = ("targets", "ids", "gaps", "rest")


class Answers(NamedTuple):
    """A teacher's answers to a batch, flat: one row for each token of an answer, in the order of the samples.

    Attributes:
        ids, gaps, rest: as in `StoredTokens`, of one temperature: Int[rows k], Float[rows k], Float[rows].
        targets: Int[rows], the token itself.
        sample: Int[rows], the dialogue in the batch; ascending.
    """

    ids: Tensor
    gaps: Tensor
    rest: Tensor
    targets: Tensor
    sample: Tensor

    def joined(self, other: Answers) -> Answers:
        """With the rows of other samples of the same batch, in the order of the samples."""
        order = torch.cat([self.sample, other.sample]).argsort(stable=True)
        return Answers(*(torch.cat(pair)[order] for pair in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True)
class TokenLayout(Layout):
    """Room for an answer of `answer_tokens` tokens; what a shorter answer leaves of it is zero.

    `features.top_tokens` says what is stored of a token. Rounding to fp16 moves a log-probability by at most 2^-11 of
    the token's distance from the likeliest logit, divided by the temperature, and the rest by nothing.

    Attributes:
        store: type of the distances between logits.
        count: likeliest tokens of each token of an answer.
        temperature: at which they can be read.
        size: tokens that student and teacher have in common; the softmax is over these.
        answer_tokens: the longest answer, its end token included.
    """

    store: Literal["fp16", "fp32"]
    count: int
    temperature: float
    size: int
    answer_tokens: int

    @property
    def needs_texts(self) -> bool:
        """Never: targets are in the row, so that no dialogue is prepared for a teacher that does not read it."""
        return False

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        layout = cls(**{key: value for key, value in values.items() if key != "kind"})
        numbers = (layout.count, layout.size, layout.answer_tokens)
        if layout.store not in _STORES or not all(isinstance(n, int) and n > 0 for n in numbers):
            raise ValueError(f"rows of {numbers} tokens in {layout.store!r}")
        if not (isinstance(layout.temperature, float) and layout.temperature > 0 and layout.count <= layout.size):
            raise ValueError(f"{layout.count} of {layout.size} tokens at temperature {layout.temperature}")
        if not 0 < layout.row_bytes < 2**31:
            raise ValueError(f"rows of {layout.row_bytes} bytes")
        return layout

    def plain(self) -> dict[str, Any]:
        return {"kind": TOKENS, **asdict(self)}

    @property
    def _id(self) -> str:
        return "<i2" if self.size <= SMALL_IDS else "<i4"

    @property
    def dtype(self) -> np.dtype[Any]:
        room, top = (self.answer_tokens,), (self.answer_tokens, self.count)
        fields = [
            ("targets", self._id, room),
            ("ids", self._id, top),
            ("gaps", _STORES[self.store][1], top),
            ("rest", "<f4", room),
        ]
        return np.dtype([(CHECK, "<u8"), ("tokens", "<i4"), *fields])

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of an answer."""
        of_id = np.dtype(self._id).itemsize
        return self.count * (of_id + np.dtype(_STORES[self.store][1]).itemsize) + of_id + 4

    @property
    def short(self) -> str:
        return f"{self.count} likeliest tokens in {self.store}, {self.token_bytes:,} bytes a token"

    def describe(self) -> str:
        return (
            f"the {self.count} likeliest of {self.size:,} tokens at temperature {self.temperature:g} in {self.store}: "
            f"{self.token_bytes:,} bytes a token, room for answers of {self.answer_tokens:,} tokens"
        )

    def lacks(self, asked: TopRequest, size: int) -> str | None:
        """Why rows like these cannot answer a method, or None if they can.

        Args:
            size: tokens that the method's student and teacher have in common.
        """
        if self.temperature != asked.temperature:
            return (
                f"its probabilities are of temperature {self.temperature:g}, and the method reads them at "
                f"{asked.temperature:g}"
            )
        if self.size != size:
            return f"its probabilities are over {self.size:,} tokens, and student and teacher share {size:,}"
        if self.count < min(asked.number, size):
            return f"it holds the {self.count} likeliest tokens, and the method reads {asked.number}"
        return None

    def differs(self, count: int | None, answer_tokens: int | None) -> list[str]:
        """Why rows like these are not what a config asks for.

        Args:
            count: likeliest tokens at least; None: as many as there are.
            answer_tokens: room for so many tokens of an answer; None: any.
        """
        reasons = []
        if count is not None and min(count, self.size) > self.count:
            reasons.append(f"it holds the {self.count} likeliest tokens, and cache.top_k is {count}")
        if answer_tokens is not None and answer_tokens != self.answer_tokens:
            reasons.append(
                f"its rows have room for {self.answer_tokens} tokens of an answer, and cache.max_answer_tokens is "
                f"{answer_tokens}"
            )
        return reasons

    def check_inputs(self, inputs: ChatInput, ids: Sequence[str]) -> None:
        lengths = inputs.answer.sum(-1)
        longest, most = int(lengths.argmax()), int(lengths.max())
        if most > self.answer_tokens:
            raise CacheError(
                f"the answer of sample {ids[longest]!r} has {most} tokens of the teacher, and a row of the cache has "
                f"room for {self.answer_tokens}: set cache.max_answer_tokens={most} or more, and build into another "
                "folder"
            )

    def answers(self, teacher: FrozenTeacher, inputs: ChatInput, precision: str) -> tuple[Answers, Tensor]:
        """What the live teacher says to a batch, as it is stored; and its exact log-probabilities, Float[rows k]."""
        at = self.temperature
        with as_in_training(inputs.texts.ids.device, precision):
            features = teacher.model(inputs, TokenNeeds())
            rows, head = features.hidden["answer"], cut_head(features.head, self.size)
            packed, exact = [], []
            for states in rows.values.split(ROWS):
                logits = head(states)
                packed.append(pack(logits, self.count, temperatures=(at,), dtype=_STORES[self.store][0]))
                exact.append(top_tokens(logits, self.count, temperature=at).log_p)
        ids, gaps, rest = (torch.cat([getattr(part, name) for part in packed]) for name in ("ids", "gaps", "rest"))
        rest = rest[:, 0].clamp(min=torch.finfo(rest.dtype).min)  # where there are no others it is -inf, never read
        return Answers(ids.long(), gaps, rest, features.targets, rows.sample), torch.cat(exact)

    def ask(self, teacher: FrozenTeacher, inputs: ChatInput, precision: str) -> dict[str, Tensor]:
        """By field, [batch ...], padded with zeros to `answer_tokens`; and `log_p`, which is compared, not stored."""
        found, log_p = self.answers(teacher, inputs, precision)
        lengths = torch.bincount(found.sample, minlength=len(inputs))
        place = torch.arange(len(found.sample), device=lengths.device) - (lengths.cumsum(0) - lengths)[found.sample]

        def padded(rows: Tensor) -> Tensor:
            table = rows.new_zeros((len(inputs), self.answer_tokens, *rows.shape[1:]))
            table[found.sample, place] = rows
            return table

        arrays = {name: padded(getattr(found, name)) for name in _OF_TOKENS}
        return {"tokens": lengths, **arrays, "log_p": padded(log_p)}

    def encode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ids of a small vocabulary in 16 bits, the upper half of them as negative numbers."""
        ids = torch.int16 if self.size <= SMALL_IDS else torch.int32
        narrow = {name: arrays[name].to(ids) for name in ("targets", "ids")}
        return {**narrow, "tokens": arrays["tokens"].int(), "gaps": arrays["gaps"], "rest": arrays["rest"]}

    def decode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask = SMALL_IDS - 1 if self.size <= SMALL_IDS else -1
        wide = {name: arrays[name].long() & mask for name in ("targets", "ids")}
        return {**arrays, **wide, "tokens": arrays["tokens"].long()}

    def tensors(self, rows: NDArray[Any]) -> dict[str, Tensor]:
        """Cut to the longest answer of these rows, so that a batch does not carry room that it does not use."""
        longest = int(rows["tokens"].max(initial=0))
        arrays = {"tokens": rows["tokens"], **{name: rows[name][:, :longest] for name in _OF_TOKENS}}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def flat(self, decoded: Mapping[str, Tensor]) -> Answers:
        """Decoded arrays as rows of tokens; a sample without an answer has none."""
        room = torch.arange(decoded["rest"].shape[1], device=decoded["tokens"].device)
        sample, place = (room < decoded["tokens"][:, None]).nonzero(as_tuple=True)
        columns = {name: decoded[name][sample, place] for name in _OF_TOKENS}
        return Answers(**columns, sample=sample)

    def top(self, found: Answers) -> TopTokens:
        """As a loss reads them."""
        stored = StoredTokens(found.ids, found.gaps, found.rest[:, None], (self.temperature,))
        return unpack(stored, temperature=self.temperature)

    def fidelity(self) -> TokenFidelity:
        return TokenFidelity(lambda arrays: self.top(self.flat(arrays)))

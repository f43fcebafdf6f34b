"""The row of a teacher that writes: for each token of the answer the likeliest tokens, and the softmax over all."""

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
from cmapkd.features.top_logits import TopLogits, top_logits
from cmapkd.methods.generative import TopRequest
from cmapkd.models import FrozenTeacher
from cmapkd.models.token_types import TokenNeeds

TOKENS = "tokens"
"""The kind of such a layout, in `cache.json`."""
SMALL_IDS = 2**16  # vocabularies up to this size have ids of two bytes
_VALUES = {"fp32": ("<f4", torch.float32), "fp16": ("<f2", torch.float16)}


class Answers(NamedTuple):
    """A teacher's answers to a batch, flat: one row for each token of an answer, in the order of the samples.

    Attributes:
        top: of each row.
        targets: Int[rows], the token itself.
        sample: Int[rows], the dialogue in the batch; ascending.
    """

    top: TopLogits
    targets: Tensor
    sample: Tensor

    def joined(self, other: Answers) -> Answers:
        """With the rows of other samples of the same batch, in the order of the samples."""
        sample = torch.cat([self.sample, other.sample])
        order = sample.argsort(stable=True)
        top = TopLogits(*(torch.cat(pair)[order] for pair in zip(self.top, other.top, strict=True)))
        return Answers(top, torch.cat([self.targets, other.targets])[order], sample[order])


@dataclass(frozen=True, slots=True)
class TokenLayout(Layout):
    """Room for an answer of `answer_tokens` tokens; what a shorter answer leaves of it is zero.

    Stored are ids, logits minus the row's largest one, and in float32 their log-sum-exp over the whole vocabulary at
    one temperature. Near zero, where the likeliest tokens are, fp16 has more digits for such differences than for
    logits: a log-probability is off by at most 2^-11 of the difference, divided by the temperature.

    Attributes:
        count: likeliest tokens of each row.
        temperature: of the log-sum-exp.
        size: tokens of the vocabulary.
        answer_tokens: the longest answer, its end token included.
    """

    store: Literal["fp16", "fp32"]
    count: int
    temperature: float
    size: int
    answer_tokens: int

    @property
    def needs_texts(self) -> bool:
        """Never: targets are in the row, so that nobody prepares a dialogue for a teacher that does not read it."""
        return False

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        layout = cls(**{key: value for key, value in values.items() if key != "kind"})
        numbers = (layout.count, layout.size, layout.answer_tokens)
        if layout.store not in _VALUES or not all(isinstance(n, int) and n > 0 for n in numbers):
            raise ValueError(f"rows of {numbers} tokens in {layout.store!r}")
        if not (isinstance(layout.temperature, float) and layout.temperature > 0 and layout.count <= layout.size):
            raise ValueError(f"{layout.count} of {layout.size} tokens at temperature {layout.temperature}")
        if not 0 < layout.row_bytes < 2**31:
            raise ValueError(f"rows of {layout.row_bytes} bytes")
        return layout

    def plain(self) -> dict[str, Any]:
        return {"kind": TOKENS, **asdict(self)}

    @property
    def dtype(self) -> np.dtype[Any]:
        ids, values = ("<i2" if self.size <= SMALL_IDS else "<i4"), _VALUES[self.store][0]
        room = self.answer_tokens
        return np.dtype(
            [
                (CHECK, "<u8"),
                ("tokens", "<i4"),
                ("targets", ids, (room,)),
                ("ids", ids, (room, self.count)),
                ("values", values, (room, self.count)),
                ("lse", "<f4", (room,)),
            ]
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of an answer."""
        of_id, of_value = (np.dtype(kind).itemsize for kind in ("<i2" if self.size <= SMALL_IDS else "<i4", self._value))
        return self.count * (of_id + of_value) + of_id + 4

    @property
    def _value(self) -> str:
        return _VALUES[self.store][0]

    @property
    def short(self) -> str:
        return f"{self.count} likeliest tokens in {self.store}, {self.token_bytes:,} bytes a token"

    def describe(self) -> str:
        return (
            f"the {self.count} likeliest of {self.size:,} tokens at temperature {self.temperature:g} in {self.store}: "
            f"{self.token_bytes:,} bytes a token, room for answers of {self.answer_tokens:,} tokens"
        )

    def lacks(self, asked: TopRequest) -> str | None:
        """Why rows like these cannot answer a method, or None if they can."""
        if self.temperature != asked.temperature:
            return (
                f"its probabilities are of temperature {self.temperature:g}, and the method reads them at "
                f"{asked.temperature:g}"
            )
        if self.count < min(asked.count, self.size):
            return f"it holds the {self.count} likeliest tokens, and the method reads {asked.count}"
        return None

    def check_inputs(self, inputs: ChatInput, ids: Sequence[str]) -> None:
        lengths = inputs.answer.sum(-1)
        if len(lengths) and int(lengths.max()) > self.answer_tokens:
            longest = int(lengths.argmax())
            raise CacheError(
                f"the answer of sample {ids[longest]!r} has {int(lengths[longest])} tokens of the teacher, and the "
                f"cache has room for {self.answer_tokens}: set cache.max_answer_tokens={int(lengths[longest])} or more, "
                "and build into another folder"
            )

    def answers(self, teacher: FrozenTeacher, inputs: ChatInput, precision: str) -> Answers:
        """What the live teacher says to a batch."""
        with as_in_training(inputs.texts.ids.device, precision):
            features = teacher.model(inputs, TokenNeeds())
            rows, head = features.hidden["answer"], features.head
            top = top_logits(rows.values, head, self.count, temperature=self.temperature)
        return Answers(top, features.targets, rows.sample)

    def ask(self, teacher: FrozenTeacher, inputs: ChatInput, precision: str) -> dict[str, Tensor]:
        """By field, [batch ...], padded with zeros to `answer_tokens`."""
        found = self.answers(teacher, inputs, precision)
        lengths = torch.bincount(found.sample, minlength=len(inputs))
        place = torch.arange(len(found.sample), device=lengths.device) - (lengths.cumsum(0) - lengths)[found.sample]

        def padded(rows: Tensor) -> Tensor:
            table = rows.new_zeros((len(inputs), self.answer_tokens, *rows.shape[1:]))
            table[found.sample, place] = rows
            return table

        arrays = {name: padded(rows) for name, rows in found.top._asdict().items()}
        return {"tokens": lengths, "targets": padded(found.targets), **arrays}

    def encode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ids of a small vocabulary in the two's complement of 16 bits. A value below fp16's range has no probability
        at any temperature that is used, and is stored as the smallest one."""
        ids, (_, values) = (torch.int16 if self.size <= SMALL_IDS else torch.int32), _VALUES[self.store]
        return {
            "tokens": arrays["tokens"].int(),
            "targets": arrays["targets"].to(ids),
            "ids": arrays["ids"].to(ids),
            "values": arrays["values"].clamp(min=torch.finfo(values).min).to(values),
            "lse": arrays["lse"].float(),
        }

    def decode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask = SMALL_IDS - 1 if self.size <= SMALL_IDS else -1
        return {
            "tokens": arrays["tokens"].long(),
            "targets": arrays["targets"].long() & mask,
            "ids": arrays["ids"].long() & mask,
            "values": arrays["values"].float(),
            "lse": arrays["lse"],
        }

    def tensors(self, rows: NDArray[Any]) -> dict[str, Tensor]:
        """Cut to the longest answer of these rows, so that a batch does not carry room that it does not use."""
        longest = int(rows["tokens"].max(initial=0))
        cut = {name: rows[name][:, :longest] for name in ("targets", "ids", "values", "lse")}
        return {
            name: torch.from_numpy(np.ascontiguousarray(array))
            for name, array in {"tokens": rows["tokens"], **cut}.items()
        }

    def flat(self, decoded: Mapping[str, Tensor]) -> Answers:
        """Decoded arrays as rows of tokens; a sample without an answer has none."""
        room = torch.arange(decoded["lse"].shape[1], device=decoded["tokens"].device)
        sample, place = (room < decoded["tokens"][:, None]).nonzero(as_tuple=True)
        top = TopLogits(*(decoded[name][sample, place] for name in TopLogits._fields))
        return Answers(top, decoded["targets"][sample, place], sample)

    def fidelity(self) -> TokenFidelity:
        return TokenFidelity(self.temperature, self.size)

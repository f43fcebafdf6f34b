"""Dialogues about pictures: turns of a sample, and a batch of them as one model reads it, prompt and answer apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from cmapkd.data.turns import Dialogue as Dialogue
from cmapkd.data.turns import Role as Role
from cmapkd.data.turns import Turn as Turn
from cmapkd.data.types import TokenBatch

Extents = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class ChatItem:
    """One dialogue with its picture as one model reads it, before it meets others in a batch.

    Attributes:
        ids: Int[length], without padding.
        answer: Bool[length], the tokens to be learned, each answer's end token among them.
        visual: Bool[length], the places of visual tokens.
        sequence: further numbers of each token that the model reads (`mm_token_type_ids`, ...), Int[length].
        pictures: the processor's tensors of the pictures, each with rows along its first axis (pictures, tiles,
            patches), as many as this dialogue has.
        given: whether the last answer is one of the data; else the student is to write it.
        rejected: the tokens of a worse last answer, its end token among them; none where none is known.
    """

    ids: Tensor
    answer: Tensor
    visual: Tensor
    sequence: Mapping[str, Tensor] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
    given: bool = True
    rejected: tuple[int, ...] = ()

    @property
    def length_rejected(self) -> int:
        """How many tokens the dialogue has with the worse answer; 0 without one."""
        return _last_answer(self.answer) + len(self.rejected) if self.rejected else 0


class ChatProcessing(Protocol):
    """A model's own way from a dialogue to its input. Picklable: it works inside data workers. Equal ones read alike.

    Attributes:
        pad_id: the token that fills short rows.
        max_tokens: longest dialogue with its picture that the model takes; None: any.
    """

    pad_id: int
    max_tokens: int | None = None

    def read(self, dialogue: Dialogue, pictures: Sequence[Image.Image]) -> ChatItem:
        """The dialogue in this model's tokens, with its pictures.

        Raises:
            ValueError: it cannot be used (too long, an empty answer, a placeholder in a text, ...), with the reason.
        """
        ...

    def fingerprint(self) -> str:
        """Changes when a dialogue could be read otherwise: tokenizer, template, all settings for pictures, lengths.

        Settings count by themselves. Two that read every picture alike may have two fingerprints.
        """
        ...


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A batch of dialogues as one model reads them.

    Attributes:
        texts: Int[batch length] and its mask; training pads on the right, prompts for generation on the left.
        answer: Bool[batch length], True at the tokens to be learned.
        visual: Bool[batch length], True at visual tokens.
        sequence: further numbers of each token by name, Int[batch length]; 0 at padding.
        pictures: the pictures' tensors by name, rows of all dialogues one after the other.
        extents: Int[batch+1] by the same names: dialogue i has the rows from `extents[i]` to before `extents[i+1]`;
            none where it shows no picture, or brought none because its answer is stored.
        pad_id: the token that fills short rows.
        max_tokens: longest dialogue that its reader takes; None: any.
        given: of each dialogue, whether its last answer is one of the data; empty: all are.
        rejected: of each dialogue, the tokens of a worse last answer; empty where no dialogue brings any.
    """

    texts: TokenBatch
    answer: Tensor
    visual: Tensor
    sequence: Mapping[str, Tensor] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
    extents: Extents = field(default_factory=dict)
    pad_id: int = 0
    max_tokens: int | None = None
    given: tuple[bool, ...] = ()
    rejected: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.texts.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False, *, images: bool = True) -> ChatInput:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return self.changed(move if images else _same, move)

    def pin_memory(self) -> ChatInput:
        return self.changed(torch.Tensor.pin_memory, torch.Tensor.pin_memory)

    def changed(self, change: Callable[[Tensor], Tensor], change_texts: Callable[[Tensor], Tensor]) -> ChatInput:
        """With `change` of the tensors of pictures, and `change_texts` of those of tokens. Extents stay on the host."""
        return replace(
            self,
            texts=self.texts.changed(change_texts),
            answer=change_texts(self.answer),
            visual=change_texts(self.visual),
            sequence={name: change_texts(numbers) for name, numbers in self.sequence.items()},
            pictures={name: change(rows) for name, rows in self.pictures.items()},
        )

    def part(self, start: int, stop: int, images: tuple[int, int] | None = None) -> ChatInput:  # noqa: ARG002
        """The dialogues from `start` to before `stop`, with the padding that they have here.

        Args:
            images: not read: `extents` say which pictures each dialogue brought.
        """
        stop = min(stop, len(self))  # the last micro-batch may ask for more than there is
        extents = {name: bounds[start : stop + 1] - bounds[start] for name, bounds in self.extents.items()}
        pictures = {
            name: rows[int(self.extents[name][start]) : int(self.extents[name][stop])]
            for name, rows in self.pictures.items()
        }
        return replace(
            self,
            texts=self.texts.part(start, stop),
            answer=self.answer[start:stop],
            visual=self.visual[start:stop],
            sequence={name: numbers[start:stop] for name, numbers in self.sequence.items()},
            pictures=pictures,
            extents=extents,
            given=self.given[start:stop],
            rejected=self.rejected[start:stop],
        )

    def rows(self, places: Sequence[int]) -> ChatInput:
        """The dialogues at `places`, in that order, padded on the right to the longest of them."""
        items = self.items()
        return join_items([items[place] for place in places], self.pad_id)

    def items(self) -> list[ChatItem]:
        """Each dialogue alone, without padding."""
        made = []
        for row in range(len(self)):
            real = self.texts.mask[row]
            made.append(
                ChatItem(
                    self.texts.ids[row][real],
                    self.answer[row][real],
                    self.visual[row][real],
                    {name: numbers[row][real] for name, numbers in self.sequence.items()},
                    {
                        name: rows[int(self.extents[name][row]) : int(self.extents[name][row + 1])]
                        for name, rows in self.pictures.items()
                    },
                    self.given[row] if self.given else True,
                    self.rejected[row] if self.rejected else (),
                )
            )
        return made

    def answers(self) -> list[list[int]]:
        """The tokens of each dialogue's last answer, its end token among them."""
        return [item.ids[_last_answer(item.answer) :].tolist() for item in self.items()]

    def room(self) -> list[int] | None:
        """How many tokens each last answer can have before its dialogue is longer than `max_tokens`; None: any."""
        if self.max_tokens is None:
            return None
        return [max(0, self.max_tokens - _last_answer(item.answer)) for item in self.items()]

    def prompts(self) -> ChatInput:
        """What stands before each last answer, padded on the left, as generation reads it."""
        return join_items([_cut(item, _last_answer(item.answer)) for item in self.items()], self.pad_id, left=True)

    def with_answers(self, answers: Sequence[Sequence[int]]) -> ChatInput:
        """The same prompts with other last answers, which alone are learned.

        Args:
            answers: tokens of each, its end token among them if it ended. An empty one leaves nothing to learn.
        """
        made = []
        for item, answer in zip(self.items(), answers, strict=True):
            prompt = _cut(item, _last_answer(item.answer))
            tail = prompt.ids.new_tensor(list(answer))
            learned = torch.ones(len(tail), dtype=torch.bool, device=tail.device)
            made.append(
                ChatItem(
                    torch.cat([prompt.ids, tail]),
                    torch.cat([torch.zeros_like(prompt.answer), learned]),
                    torch.cat([prompt.visual, ~learned]),
                    {name: torch.cat([numbers, torch.zeros_like(tail)]) for name, numbers in prompt.sequence.items()},
                    prompt.pictures,
                )
            )
        return join_items(made, self.pad_id)


def join_items(items: Sequence[ChatItem], pad_id: int, *, left: bool = False) -> ChatInput:
    """Dialogues as a batch, padded to the longest of them.

    Args:
        left: whether padding stands on the left.
    """
    longest = max(len(item.ids) for item in items)

    def padded(rows: Sequence[Tensor], fill: int | bool) -> Tensor:
        table = rows[0].new_full((len(rows), longest), fill)
        for number, row in enumerate(rows):
            table[number, longest - len(row) if left else 0 : longest if left else len(row)] = row
        return table

    ids = padded([item.ids for item in items], pad_id)
    mask = padded([torch.ones_like(item.ids, dtype=torch.bool) for item in items], False)
    names = dict.fromkeys(name for item in items for name in item.pictures)
    extents, pictures = {}, {}
    for name in names:
        rows = [item.pictures[name] for item in items if name in item.pictures]
        counts = [len(item.pictures[name]) if name in item.pictures else 0 for item in items]
        pictures[name] = torch.cat(rows)
        extents[name] = torch.tensor([0, *counts]).cumsum(0)
    return ChatInput(
        TokenBatch(ids, mask),
        padded([item.answer for item in items], False),
        padded([item.visual for item in items], False),
        {name: padded([item.sequence[name] for item in items], 0) for name in items[0].sequence},
        pictures,
        extents,
        pad_id,
        given=() if all(item.given for item in items) else tuple(item.given for item in items),
        rejected=tuple(item.rejected for item in items) if any(item.rejected for item in items) else (),
    )


def _last_answer(answer: Tensor) -> int:
    """Where the last run of True begins; the end of the row where there is none."""
    places = answer.nonzero().flatten().tolist()
    if not places:
        return len(answer)
    start: int = places[-1]
    known = set(places)
    while start - 1 in known:
        start -= 1
    return start


def _cut(item: ChatItem, stop: int) -> ChatItem:
    """The tokens before `stop`, with all pictures."""
    return ChatItem(
        item.ids[:stop],
        item.answer[:stop],
        item.visual[:stop],
        {name: numbers[:stop] for name, numbers in item.sequence.items()},
        item.pictures,
    )


def _same(tensor: Tensor) -> Tensor:
    return tensor

"""A model that writes, under evaluation: dialogues are read in batches, and each answer is written once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from PIL import Image
from torch.utils.data import Dataset

from cmapkd.data.dialogues import ChatInput, ChatItem, ChatProcessing, Dialogue, join_items
from cmapkd.data.types import BadSampleError, Source
from cmapkd.data.workers import ReadAhead
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.dialogues import Asked
from cmapkd.evaluation.embed import OnBadSample
from cmapkd.evaluation.share import ALONE, Share
from cmapkd.models.generative import Decoding, GenerativeModel
from cmapkd.models.texts import evaluating
from cmapkd.models.token_types import TokenFeatures, TokenNeeds

R = TypeVar("R")

_ITEM_BYTES = 2**21  # about a picture of one dialogue after its processor: 3 x 420 x 420 numbers of 4 bytes


@dataclass(frozen=True, slots=True)
class Written:
    """A generated answer.

    Attributes:
        text: without its end token.
        num_tokens: with its end token.
        ended: whether it has an end token; false where it was cut at the most tokens allowed.
    """

    text: str
    num_tokens: int
    ended: bool


class NothingReadError(ValueError):
    """A model can read none of the dialogues that it is asked."""


@dataclass
class Writer:
    """One model's answers to the dialogues of one source.

    Attributes:
        share: of several processes that compute together. The first keeps what one alone would.
        bad: reasons by sample, of the samples that cannot be read, or of which a dialogue could not be asked.
        asked: every dialogue that was asked, by sample and prompt.
    """

    model: GenerativeModel
    source: Source
    config: EvaluationConfig
    device: torch.device
    autocast: torch.dtype | None = None
    on_bad_sample: OnBadSample = "skip"
    share: Share = ALONE
    bad: dict[str, str] = field(default_factory=dict)
    asked: dict[tuple[int, Dialogue], Asked] = field(default_factory=dict)
    _written: dict[tuple[int, Dialogue, int], Written | None] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """What was asked so far: numbers of `images`, of their `captions` that were references, and of `questions`."""
        captioned = {each.index: len(each.references) for each in self.asked.values() if each.question is None}
        return {
            "images": len({each.index for each in self.asked.values()}),
            "captions": sum(captioned.values()),
            "questions": sum(each.question is not None for each in self.asked.values()),
        }

    @property
    def num_skipped(self) -> int:
        """Samples of which nothing could be asked; of the other bad ones a part was."""
        return len(self.bad.keys() - {each.sample for each in self.asked.values()})

    @property
    def batch_size(self) -> int:
        return self.config.writing.batch_size

    @property
    def precision(self) -> str:
        """The type in which the language model computes, as torch names it."""
        if self.autocast is not None:
            return str(self.autocast).removeprefix("torch.")
        return str(next(p.dtype for p in self.model.parameters() if p.is_floating_point())).removeprefix("torch.")

    def protocol(self, **more: Any) -> dict[str, Any]:
        """What the scores depend on beside model and data."""
        return {"batch_size": self.batch_size, "precision": self.precision, **more}

    def computing(self) -> AbstractContextManager[None]:
        """Eval mode, without gradient, on the device and in the precision of this evaluation."""
        return evaluating(self.model, self.device, self.autocast)

    def written(self, asked: Sequence[Asked], *, most: int) -> list[Written | None]:
        """The greedy answer to each dialogue, cut after `most` tokens; None where it could not be asked.

        Raises: as `computed`.
        """
        new = {(each.index, each.prompt, most): each for each in asked}
        todo = [each for key, each in new.items() if key not in self._written]
        self._written.update(dict.fromkeys(new.keys() - self._written.keys()))
        found = self.computed(partial(_answers, most=most), todo, [each.unread() for each in todo])
        self._written |= {(todo[place].index, todo[place].prompt, most): answer for place, answer in found.items()}
        answers = [self._written[each.index, each.prompt, most] for each in asked]
        if asked and not any(answers):  # of which none is new
            raise self._nothing_read(len(asked))
        return answers

    def features(self, items: Sequence[ChatItem]) -> TokenFeatures:
        """Final states of the answers of a batch, on the device; called inside `computing`."""
        features: TokenFeatures = self.model(self.joined(items), TokenNeeds())
        return features

    def joined(self, items: Sequence[ChatItem]) -> ChatInput:
        return join_items(items, self.model.processor.pad_id).to(self.device)

    def computed(
        self,
        work: Callable[[Writer, Sequence[ChatItem]], Sequence[R]],
        asked: Sequence[Asked],
        dialogues: Sequence[Dialogue],
        pictures: Sequence[int] | None = None,
    ) -> dict[int, R]:
        """What `work` makes of each dialogue, by its place in `asked`; bad ones are left out.

        All processes of `share` call this with the same arguments, and each computes whole batches in turn. So all get
        what one process alone would get, bit for bit.

        Args:
            work: makes something of every dialogue of a batch, inside `computing`. Processes send it and what it makes
                to one another, so it is a function of a module, and makes no tensors.
            dialogues: what is read of each of `asked`.
            pictures: indices of the samples whose pictures are shown, if not their own. No sample is bad because
                another one's picture makes its dialogue too long.
        Raises:
            NothingReadError: in the first process: there is something to ask, and not one dialogue could be read with
                its own picture.
            BadSampleError: of the first that could not, with `on_bad_sample="error"`.
        """
        self.share.call(work=work, asked=asked, dialogues=dialogues, pictures=pictures)
        shown = [each.index for each in asked] if pictures is None else pictures
        chunks = self._read(shown, dialogues, self.share.mine)
        found: dict[int, R] = {}
        for places, made, bad in self.share.all_of(self._made(work, chunk) for chunk in chunks):
            self._note(asked, places, bad if pictures is None else ())
            found.update(zip(places, made, strict=True))
        if asked and not found and pictures is None and self.share.leads:
            raise self._nothing_read(len(asked))
        return found

    def chunks(
        self, asked: Sequence[Asked], dialogues: Sequence[Dialogue]
    ) -> Iterator[tuple[list[int], list[ChatItem]]]:
        """Dialogues as the model reads them, `batch_size` at once, each with its place in `asked`; bad ones left out.

        One process alone reads them.

        Raises: as `computed`.
        """
        num_read = 0
        for chunk in self._read([each.index for each in asked], dialogues, slice(None)):
            self._note(asked, chunk.places, chunk.bad)
            num_read += len(chunk.places)
            yield chunk.places, chunk.items
        if asked and not num_read:
            raise self._nothing_read(len(asked))

    def _read(self, shown: Sequence[int], dialogues: Sequence[Dialogue], mine: slice) -> ReadAhead[int, _Chunk]:
        """Of all chunks, those of one process."""
        reading = _Reading(self.source, self.model.processor, shown, dialogues, self.batch_size)
        return ReadAhead(
            reading,
            range(len(reading))[mine],
            workers=self.config.workers,
            timeout=self.config.timeout,
            item_bytes=self.batch_size * _ITEM_BYTES,
            name=reading.name,
        )

    def _made(self, work: Callable[[Writer, Sequence[ChatItem]], Sequence[R]], chunk: _Chunk) -> _Made[R]:
        if not chunk.items:
            return _Made(chunk.places, [], chunk.bad)
        with self.computing():
            return _Made(chunk.places, work(self, chunk.items), chunk.bad)

    def _note(self, asked: Sequence[Asked], places: Sequence[int], bad: Sequence[tuple[int, str]]) -> None:
        """What could be read of `asked`, and what could not.

        Raises:
            BadSampleError: of the first that could not, with `on_bad_sample="error"`.
        """
        for place, reason in bad:
            if self.on_bad_sample == "error":
                raise BadSampleError(asked[place].sample, reason)
            self.bad.setdefault(asked[place].sample, reason)
        for place in places:
            self.asked.setdefault((asked[place].index, asked[place].dialogue), asked[place])

    def _nothing_read(self, tried: int) -> NothingReadError:
        sample, reason = next(iter(self.bad.items()))
        return NothingReadError(
            f"{self.model.name} could read no dialogue of {self.source.name} ({tried} tried); the first: sample "
            f"{sample!r}: {reason}"
        )


def read_by_all(
    writers: Sequence[Writer], asked: Sequence[Asked], dialogues: Sequence[Dialogue]
) -> Iterator[tuple[list[int], list[list[ChatItem]]]]:
    """Batches of the dialogues that all models can read, each as every model reads it, with their places in `asked`.

    Raises: as `Writer.computed`.
    """
    for chunks in zip(*(writer.chunks(asked, dialogues) for writer in writers), strict=True):
        read = [dict(zip(places, items, strict=True)) for places, items in chunks]
        common = [place for place in read[0] if all(place in other for other in read)]
        if common:
            yield common, [[of_model[place] for place in common] for of_model in read]


def _answers(writer: Writer, items: Sequence[ChatItem], *, most: int) -> list[Written]:
    """Greedy, cut after `most` tokens."""
    model, answers = writer.model, list[Written]()
    for ids in model.generate(writer.joined(items), Decoding(max_new_tokens=most)):
        ended = bool(ids) and ids[-1] in model.vocabulary.end_ids
        text = model.processor.decode(ids[:-1] if ended else ids).strip()
        answers.append(Written(text, len(ids), ended))
    return answers


class _Made(NamedTuple, Generic[R]):
    """Of a chunk."""

    places: list[int]
    results: Sequence[R]
    bad: list[tuple[int, str]]


class _Chunk(NamedTuple):
    places: list[int]
    items: list[ChatItem]
    bad: list[tuple[int, str]]  # place and reason


class _Reading(Dataset[_Chunk]):
    """Chunk `i` of the dialogues, in one model's tokens and pixels. Works inside data workers."""

    def __init__(
        self,
        source: Source,
        processor: ChatProcessing,
        pictures: Sequence[int],
        dialogues: Sequence[Dialogue],
        size: int,
    ) -> None:
        self.source, self.processor, self.size = source, processor, size
        self.pictures, self.dialogues = pictures, dialogues

    def __len__(self) -> int:
        return -(-len(self.dialogues) // self.size)

    def name(self, chunk: int) -> str:
        first = chunk * self.size
        return f"dialogues {first} to {min(first + self.size, len(self.dialogues)) - 1} of {self.source.name}"

    def __getitem__(self, chunk: int) -> _Chunk:
        read = _Chunk([], [], [])
        seen: tuple[int, Image.Image] | None = None
        for place in range(chunk * self.size, min((chunk + 1) * self.size, len(self.dialogues))):
            index, dialogue = self.pictures[place], self.dialogues[place]
            try:
                if seen is None or seen[0] != index:  # a picture has several questions, one after the other
                    seen = index, self.source[index].image
                pictures = [seen[1]] * sum(turn.pictures for turn in dialogue)
                item = self.processor.read(dialogue, pictures)
            except ValueError as error:  # BadSampleError is one
                read.bad.append((place, error.reason if isinstance(error, BadSampleError) else str(error)))
            else:
                read.places.append(place)
                read.items.append(item)
        return read

"""A model that writes, under evaluation: dialogues are read in batches, and each answer is written once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from cmapkd.data.dialogues import ChatInput, ChatItem, ChatProcessing, Dialogue, join_items
from cmapkd.data.types import BadSampleError, Source
from cmapkd.data.workers import ReadAhead
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.dialogues import Asked
from cmapkd.evaluation.embed import OnBadSample
from cmapkd.models.generative import Decoding, GenerativeModel
from cmapkd.models.texts import evaluating
from cmapkd.models.token_types import TokenFeatures, TokenNeeds

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
        bad: reasons by sample, of the samples that cannot be read, or of which a dialogue could not be asked.
        asked: every dialogue that was asked, by sample and prompt.
    """

    model: GenerativeModel
    source: Source
    config: EvaluationConfig
    device: torch.device
    autocast: torch.dtype | None = None
    on_bad_sample: OnBadSample = "skip"
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

        Raises: as `chunks`.
        """
        new = {(each.index, each.prompt, most): each for each in asked}
        todo = [each for key, each in new.items() if key not in self._written]
        self._written.update(dict.fromkeys(new.keys() - self._written.keys()))
        decoding, ends = Decoding(max_new_tokens=most), set(self.model.vocabulary.end_ids)
        for places, items in self.batches(todo, [each.unread() for each in todo]):
            with self.computing():
                generated = self.model.generate(self.joined(items), decoding)
            for place, ids in zip(places, generated, strict=True):
                each = todo[place]
                ended = bool(ids) and ids[-1] in ends
                text = self.model.processor.decode(ids[:-1] if ended else ids).strip()
                self._written[each.index, each.prompt, most] = Written(text, len(ids), ended)
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

    def batches(
        self, asked: Sequence[Asked], dialogues: Sequence[Dialogue], pictures: Sequence[int] | None = None
    ) -> Iterator[tuple[list[int], list[ChatItem]]]:
        """As `chunks`, without empty ones."""
        return (chunk for chunk in self.chunks(asked, dialogues, pictures) if chunk[0])

    def chunks(
        self, asked: Sequence[Asked], dialogues: Sequence[Dialogue], pictures: Sequence[int] | None = None
    ) -> Iterator[tuple[list[int], list[ChatItem]]]:
        """Dialogues as the model reads them, `batch_size` at once, each with its place in `asked`; bad ones left out.

        Args:
            dialogues: what is read of each of `asked`.
            pictures: indices of the samples whose pictures are shown, if not their own. No sample is bad because
                another one's picture makes its dialogue too long.
        Raises:
            NothingReadError: there is something to ask, and not one dialogue could be read with its own picture.
            BadSampleError: of the first that could not, with `on_bad_sample="error"`.
        """
        shown = [each.index for each in asked] if pictures is None else list(pictures)
        reading = _Reading(self.source, self.model.processor, shown, dialogues, self.batch_size)
        chunks = ReadAhead(
            reading,
            range(len(reading)),
            workers=self.config.workers,
            timeout=self.config.timeout,
            item_bytes=self.batch_size * _ITEM_BYTES,
            name=reading.name,
        )
        num_read = 0
        for chunk in chunks:
            for place, reason in chunk.bad if pictures is None else ():
                if self.on_bad_sample == "error":
                    raise BadSampleError(asked[place].sample, reason)
                self.bad.setdefault(asked[place].sample, reason)
            for place in chunk.places:
                self.asked.setdefault((asked[place].index, asked[place].dialogue), asked[place])
            num_read += len(chunk.places)
            yield chunk.places, chunk.items
        if asked and not num_read and pictures is None:
            raise self._nothing_read(len(asked))

    def _nothing_read(self, tried: int) -> NothingReadError:
        sample, reason = next(iter(self.bad.items()))
        return NothingReadError(
            f"{self.model.name} could read no dialogue of {self.source.name} ({tried} tried); the first: sample "
            f"{sample!r}: {reason}"
        )


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

"""What a head that learns with the student is taught by a training sample, made where the run reads its samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmapkd.data.random import uniforms
from cmapkd.data.types import BadSampleError, Sample, Source, TokenBatch
from cmapkd.data.views import View
from cmapkd.evaluation.probes.decoder import Words
from cmapkd.evaluation.probes.detector import box_targets
from cmapkd.evaluation.probes.features import whole_picture
from cmapkd.evaluation.probes.fusion import answer_shares
from cmapkd.evaluation.vqa import normalise_answer
from cmapkd.models.base import ImageSpec, Tokenizer


class Lesson(ABC):
    """How one head reads samples. Picklable: it works inside data workers."""

    @abstractmethod
    def read(self, sample: Sample, epoch: int) -> Any:
        """What the head is taught by the sample in this epoch; None where it has nothing to teach."""

    @abstractmethod
    def join(self, items: Sequence[Any]) -> tuple[dict[str, Tensor], TokenBatch | None]:
        """One row for each item: what the loss compares with, and the texts that the head reads, if any."""


class QuestionLesson(Lesson):
    """In each epoch the image's next question that one of `answers` answers."""

    def __init__(self, answers: Sequence[str], tokenizer: Tokenizer) -> None:
        self.answers, self.tokenizer = tuple(answers), tokenizer
        self._known = frozenset(answers)

    def read(self, sample: Sample, epoch: int) -> Any:
        fit = [q for q in sample.questions if any(normalise_answer(answer) in self._known for answer in q.answers)]
        return fit[_turn(sample.id, "question", epoch, len(fit))] if fit else None

    def join(self, items: Sequence[Any]) -> tuple[dict[str, Tensor], TokenBatch | None]:
        numbers, shares = answer_shares(items, self.answers, normalise=normalise_answer)
        return {"answers": numbers, "shares": shares}, self.tokenizer([item.question for item in items])


class CaptionLesson(Lesson):
    """In each epoch the image's next caption."""

    def __init__(self, words: Words) -> None:
        self.words = words

    def read(self, sample: Sample, epoch: int) -> Any:
        return sample.captions[_turn(sample.id, "caption", epoch, len(sample.captions))] if sample.captions else None

    def join(self, items: Sequence[Any]) -> tuple[dict[str, Tensor], TokenBatch | None]:
        return {"words": self.words(items)}, None


class BoxLesson(Lesson):
    """The image's boxes of the classes `names`; an image without one is taken as not annotated."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._place = {name: number for number, name in enumerate(names)}

    def read(self, sample: Sample, epoch: int) -> Any:  # noqa: ARG002  the same in every epoch
        boxes, labels = box_targets(sample.boxes, sample.image.size, self._place)
        return (boxes, labels) if bool((labels >= 0).any()) else None

    def join(self, items: Sequence[Any]) -> tuple[dict[str, Tensor], TokenBatch | None]:
        most = max(len(labels) for _, labels in items)
        boxes, labels = torch.zeros(len(items), most, 4), torch.full((len(items), most), -1)
        for number, (corners, kinds) in enumerate(items):
            boxes[number, : len(corners)], labels[number, : len(kinds)] = corners, kinds
        return {"boxes": boxes, "labels": labels}, None


def _turn(sample_id: str, what: str, epoch: int, number: int) -> int:
    """Each epoch the next, from a first one that the id decides."""
    return (int(uniforms(1, what, sample_id)[0] * number) + epoch) % number


@dataclass(frozen=True, slots=True)
class Taught:
    """One head's part of a batch: which of its pictures, what the loss compares with, and texts."""

    rows: Tensor  # Int[items], ascending
    targets: dict[str, Tensor] = field(default_factory=dict)
    texts: TokenBatch | None = None

    def among(self, start: int, stop: int) -> Taught:
        """What is taught by the pictures from `start` to before `stop`, these counted from 0."""
        first, last = (int((self.rows < place).sum()) for place in (start, stop))
        targets = {name: values[first:last] for name, values in self.targets.items()}
        texts = self.texts.part(first, last) if self.texts is not None else None
        return Taught(self.rows[first:last] - start, targets, texts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Taught:
        targets = {name: values.to(device, non_blocking=non_blocking) for name, values in self.targets.items()}
        return Taught(self.rows, targets, None if self.texts is None else self.texts.to(device, non_blocking))

    def pin_memory(self) -> Taught:
        targets = {name: values.pin_memory() for name, values in self.targets.items()}
        return Taught(self.rows, targets, None if self.texts is None else self.texts.pin_memory())


@dataclass(frozen=True, slots=True)
class LessonBatch:
    """What all heads are taught by a batch: whole pictures of the samples that teach any, and each head's part."""

    pictures: Tensor  # Float[pictures 3 size size]
    taught: dict[str, Taught]
    num_samples: int  # of the batch: those that are no head's rows are masked
    samples: Tensor  # Int[pictures], ascending: whose picture of the batch each is

    def part(self, start: int, stop: int) -> LessonBatch:
        """What is taught by the samples from `start` to before `stop`."""
        first, last = (int((self.samples < place).sum()) for place in (start, stop))
        taught = {name: each.among(first, last) for name, each in self.taught.items()}
        size = min(stop, self.num_samples) - start
        return LessonBatch(self.pictures[first:last], taught, size, self.samples[first:last] - start)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LessonBatch:
        """With what the losses read on a device. Pictures go there a micro-batch at a time; places stay here."""
        taught = {name: each.to(device, non_blocking) for name, each in self.taught.items()}
        return LessonBatch(self.pictures, taught, self.num_samples, self.samples)

    def pin_memory(self) -> LessonBatch:
        taught = {name: each.pin_memory() for name, each in self.taught.items()}
        return LessonBatch(self.pictures.pin_memory(), taught, self.num_samples, self.samples)


class LessonReader:
    """Reads for every head, each picture once."""

    def __init__(self, spec: ImageSpec, lessons: dict[str, Lesson]) -> None:
        self.spec, self.lessons = spec, lessons

    def read(self, sample: Sample, view: View, epoch: int) -> tuple[Tensor | None, dict[str, Any]]:  # noqa: ARG002
        items = {name: lesson.read(sample, epoch) for name, lesson in self.lessons.items()}
        wanted = any(item is not None for item in items.values())
        return whole_picture(self.spec, sample.image) if wanted else None, items

    def join(self, items: Sequence[tuple[Tensor | None, dict[str, Any]]]) -> LessonBatch:
        shown = [(picture, each) for picture, each in items if picture is not None]
        samples = torch.tensor([row for row, (picture, _) in enumerate(items) if picture is not None], dtype=torch.long)
        taught = {}
        for name, lesson in self.lessons.items():
            rows = [row for row, (_, each) in enumerate(shown) if each[name] is not None]
            parts = lesson.join([shown[row][1][name] for row in rows]) if rows else ({}, None)
            taught[name] = Taught(torch.tensor(rows, dtype=torch.long), *parts)
        size = self.spec.size
        pictures = torch.stack([picture for picture, _ in shown]) if shown else torch.zeros(0, 3, size, size)
        return LessonBatch(pictures, taught, len(items), samples)


def survey(source: Source, *, most: int) -> list[Sample]:
    """Up to `most` readable samples, spread evenly, without their pictures.

    Raises:
        ValueError: none can be read.
    """
    found: list[Sample] = []
    stride = max(1, -(-len(source) // most))
    for index in range(0, len(source), stride):
        try:
            sample = source[index]
        except BadSampleError:  # the training meets it again, and counts it or stops
            continue
        thumb = sample.image.resize((1, 1))
        found.append(Sample(sample.id, thumb, sample.captions, sample.label, sample.questions, sample.boxes))
    if not found:
        raise ValueError(f"no sample of {source.name} could be read")
    return found

"""What heads that learn with the student read of training samples; made where the run reads its samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from cmapkd.data.random import uniforms
from cmapkd.data.types import BadSampleError, Sample, Source, TokenBatch
from cmapkd.data.views import View
from cmapkd.evaluation.probes.decoder import WordTokenizer
from cmapkd.evaluation.probes.detector import box_targets
from cmapkd.evaluation.probes.features import whole_picture
from cmapkd.evaluation.probes.fusion import answer_shares
from cmapkd.evaluation.vqa import normalise_answer
from cmapkd.models.base import ImageSpec, Tokenizer


class HeadTargets(ABC):
    """Makes the targets of one head from samples. Picklable: it works inside data workers."""

    @abstractmethod
    def read(self, sample: Sample, epoch: int) -> Any:
        """What the head learns from the sample in this epoch; None where the sample has nothing for it."""

    @abstractmethod
    def join(self, items: Sequence[Any]) -> tuple[dict[str, Tensor], TokenBatch | None]:
        """Targets of the loss by name, [items ...], and the texts that the head reads, if any, one for each item."""


class QuestionTargets(HeadTargets):
    """In each epoch the image's next question that one of `answers` answers.

    Targets: `answers` Int[items most] and `shares` Float[items most], see `answer_shares`.
    """

    def __init__(self, answers: Sequence[str], tokenizer: Tokenizer) -> None:
        self.answers, self.tokenizer = tuple(answers), tokenizer
        self._known = frozenset(answers)

    def read(self, sample: Sample, epoch: int) -> Any:
        fit = [q for q in sample.questions if any(normalise_answer(answer) in self._known for answer in q.answers)]
        return fit[_turn(sample.id, "question", epoch, len(fit))] if fit else None

    def join(self, items: Sequence[Any]) -> tuple[dict[str, Tensor], TokenBatch | None]:
        numbers, shares = answer_shares(items, self.answers, normalise=normalise_answer)
        return {"answers": numbers, "shares": shares}, self.tokenizer([item.question for item in items])


class CaptionTargets(HeadTargets):
    """In each epoch the image's next caption. Targets: `words` Int[items length], see `WordTokenizer`."""

    def __init__(self, words: WordTokenizer) -> None:
        self.words = words

    def read(self, sample: Sample, epoch: int) -> Any:
        return sample.captions[_turn(sample.id, "caption", epoch, len(sample.captions))] if sample.captions else None

    def join(self, items: Sequence[Any]) -> tuple[dict[str, Tensor], TokenBatch | None]:
        return {"words": self.words(items)}, None


class BoxTargets(HeadTargets):
    """The image's boxes of the classes `names`; an image without one is taken as not annotated.

    Targets: `boxes` Float[items most 4] as fractions of the sides, and `labels` Int[items most], -1 in unused rows.
    """

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
class HeadBatch:
    """One head's part of a batch.

    Attributes:
        rows: the pictures of the batch that the head learns from, ascending; on the CPU.
        targets: of the head's loss by name, [items ...], row i of picture `rows[i]`.
        texts: that the head reads, one for each item; None: it reads none.
    """

    rows: Int[Tensor, " items"]
    targets: dict[str, Tensor] = field(default_factory=dict)
    texts: TokenBatch | None = None

    def part(self, start: int, stop: int) -> HeadBatch:
        """The part of the pictures from `start` to before `stop`, which are then counted from 0."""
        first, last = (int((self.rows < place).sum()) for place in (start, stop))
        targets = {name: values[first:last] for name, values in self.targets.items()}
        texts = self.texts.part(first, last) if self.texts is not None else None
        return HeadBatch(self.rows[first:last] - start, targets, texts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> HeadBatch:
        targets = {name: values.to(device, non_blocking=non_blocking) for name, values in self.targets.items()}
        return HeadBatch(self.rows, targets, None if self.texts is None else self.texts.to(device, non_blocking))

    def pin_memory(self) -> HeadBatch:
        targets = {name: values.pin_memory() for name, values in self.targets.items()}
        return HeadBatch(self.rows, targets, None if self.texts is None else self.texts.pin_memory())


@dataclass(frozen=True, slots=True)
class JointBatch:
    """What all heads learn from a batch: whole pictures of the samples that some head learns from.

    Attributes:
        pictures: at the student's size, in bytes.
        by_head: each head's part, by the head's name.
        num_samples: of the batch; samples that are in no row of a head are masked there.
        samples: the sample of the batch that each picture belongs to, ascending.
    """

    pictures: UInt8[Tensor, "pictures 3 size size"]
    by_head: dict[str, HeadBatch]
    num_samples: int
    samples: Int[Tensor, " pictures"]

    def part(self, start: int, stop: int) -> JointBatch:
        """The part of the samples from `start` to before `stop`."""
        first, last = (int((self.samples < place).sum()) for place in (start, stop))
        by_head = {name: part.part(first, last) for name, part in self.by_head.items()}
        size = min(stop, self.num_samples) - start
        return JointBatch(self.pictures[first:last], by_head, size, self.samples[first:last] - start)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> JointBatch:
        """With what the losses read on a device. Pictures go there a micro-batch at a time; places stay here."""
        by_head = {name: part.to(device, non_blocking) for name, part in self.by_head.items()}
        return JointBatch(self.pictures, by_head, self.num_samples, self.samples)

    def pin_memory(self) -> JointBatch:
        by_head = {name: part.pin_memory() for name, part in self.by_head.items()}
        return JointBatch(self.pictures.pin_memory(), by_head, self.num_samples, self.samples)


class JointExtra:
    """Reads samples for every head, each picture once; an `Extra` of the run's batches."""

    def __init__(self, spec: ImageSpec, targets: dict[str, HeadTargets]) -> None:
        self.spec, self.targets = spec, targets

    def read(
        self,
        sample: Sample,
        view: View,  # noqa: ARG002  heads see whole pictures
        epoch: int,
    ) -> tuple[UInt8[Tensor, "3 size size"] | None, dict[str, Any]]:
        """The whole picture, where a head learns from the sample, and each head's item."""
        items = {name: maker.read(sample, epoch) for name, maker in self.targets.items()}
        wanted = any(item is not None for item in items.values())
        return whole_picture(self.spec, sample.image) if wanted else None, items

    def join(self, items: Sequence[tuple[Tensor | None, dict[str, Any]]]) -> JointBatch:
        shown = [(picture, of_heads) for picture, of_heads in items if picture is not None]
        samples = torch.tensor([row for row, (picture, _) in enumerate(items) if picture is not None], dtype=torch.long)
        by_head = {}
        for name, maker in self.targets.items():
            rows = [row for row, (_, of_heads) in enumerate(shown) if of_heads[name] is not None]
            parts = maker.join([shown[row][1][name] for row in rows]) if rows else ({}, None)
            by_head[name] = HeadBatch(torch.tensor(rows, dtype=torch.long), *parts)
        none = torch.zeros(0, 3, self.spec.size, self.spec.size, dtype=torch.uint8)
        pictures = torch.stack([picture for picture, _ in shown]) if shown else none
        return JointBatch(pictures, by_head, len(items), samples)


def survey(source: Source, *, most: int) -> list[Sample]:
    """Up to `most` readable samples, spread evenly, without their pictures.

    Raises:
        ValueError: none can be read.
    """
    samples: list[Sample] = []
    stride = max(1, -(-len(source) // most))
    for index in range(0, len(source), stride):
        try:
            sample = source[index]
        except BadSampleError:  # the training meets it again, and counts it or stops
            continue
        thumb = sample.image.resize((1, 1))
        samples.append(Sample(sample.id, thumb, sample.captions, sample.label, sample.questions, sample.boxes))
    if not samples:
        raise ValueError(f"no sample of {source.name} could be read")
    return samples

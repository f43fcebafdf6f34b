"""The two types every part of the toolkit exchanges about data: a `Sample` of a source, and a `Batch` of views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Box:
    """An object in pixels of the original image: left, top, width, height (the COCO convention) and its name.

    A `crowd` box surrounds many objects at once: it is no object to learn, and detections in it count neither way.
    `area` is that of the object's outline where one was drawn, in square pixels; COCO tells small from large by it.
    """

    x: float
    y: float
    width: float
    height: float
    name: str
    crowd: bool = False
    area: float | None = None


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """A question and its accepted answers; `kind` is `yes/no`, `number` or `other`, as VQA reports them.

    `id` is the question's own where the data numbers its questions, as result files name it.
    """

    question: str
    answers: tuple[str, ...]
    kind: str = "other"
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with everything that is said of it.

    `id` is stable: the same sample has the same id in every process, run and order of reading; views and caches are
    keyed by it. `image` is RGB, upright (EXIF applied) and of any size. `texts` are further texts by pool: `synthetic`
    are captions that a model wrote.
    """

    id: str
    image: Image.Image
    captions: tuple[str, ...] = ()
    label: int | None = None
    questions: tuple[QuestionAnswer, ...] = ()
    boxes: tuple[Box, ...] = ()
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class BadSampleError(ValueError):
    """A sample that cannot be used, with its id and the reason; what follows is the run's `on_bad_sample`."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(f"sample {sample_id!r}: {reason}")
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadSampleError], tuple[str, str]]:
        """Crosses a worker process whole: an exception is rebuilt from its own arguments, not from its message."""
        return type(self), (self.sample_id, self.reason)


@runtime_checkable
class Source(Protocol):
    """Samples by position. Reading position i twice, in any process, gives the same sample."""

    name: str

    def __len__(self) -> int:
        """Number of samples, readable or not."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

        Raises:
            BadSampleError: it cannot be read (missing or truncated file, no caption, ...).
        """
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the sample at `index` without decoding its image, for passes over the text alone.

        Raises:
            BadSampleError: what is said of the image cannot be read.
        """
        ...

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the labels, by number; None where samples carry no label."""
        ...

    def fingerprint(self) -> str:
        """Changes when the samples do and not when they are copied: a hash of names and sizes, not of every byte."""
        ...


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Token ids of a batch of texts, which positions are not padding, and where in its text each token stands.

    A span is the first character of a token and the one after its last, in the text as it was given, before any
    cleaning. It is 0 0 for special tokens, padding, and tokens whose characters cleaning has changed beyond matching.
    `spans` is None where the tokenizer cannot tell.
    """

    ids: Tensor  # Int[batch length]
    mask: Tensor  # Bool[batch length], True where a real token stands (special tokens included)
    spans: Tensor | None = None  # Int[batch length 2]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        return self._map(torch.Tensor.pin_memory)

    def part(self, start: int, stop: int) -> TokenBatch:
        return self._map(lambda tensor: tensor[start:stop])

    def rows(self, places: Tensor) -> TokenBatch:
        """The texts at `places`, in that order."""
        return self._map(lambda tensor: tensor[places])

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        return TokenBatch(change(self.ids), change(self.mask), None if self.spans is None else change(self.spans))


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One model's own form of the batch: pixels after its resize and normalisation, ids of its tokenizer."""

    images: Tensor  # Float[batch 3 height width]
    texts: TokenBatch
    more_texts: dict[str, TokenBatch] = field(default_factory=dict)  # by pool: one further text of each sample

    def to(self, device: torch.device | str, non_blocking: bool = False, *, images: bool = True) -> ModelInput:
        pixels = self.images.to(device, non_blocking=non_blocking) if images else self.images
        return self._map(pixels, lambda texts: texts.to(device, non_blocking))

    def pin_memory(self) -> ModelInput:
        return self._map(self.images.pin_memory(), TokenBatch.pin_memory)

    def part(self, start: int, stop: int, images: tuple[int, int] | None = None) -> ModelInput:
        """The pairs from `start` to before `stop`; `images` says where their pixels stand, if elsewhere."""
        return self._map(self.images[slice(*(images or (start, stop)))], lambda texts: texts.part(start, stop))

    def _map(self, images: Tensor, change: Callable[[TokenBatch], TokenBatch]) -> ModelInput:
        return ModelInput(images, change(self.texts), {pool: change(texts) for pool, texts in self.more_texts.items()})


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A model's stored answers to a batch, as they lie on disk, and which places of the batch have none."""

    arrays: dict[str, Tensor]  # [batch ...] each; zeros in places without an answer
    missing: Tensor  # Int[places], ascending: `ModelInput.images` holds exactly these
    samples: Tensor  # Int[batch], where each sample stands in the source

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StoredRows:
        arrays = {name: array.to(device, non_blocking=non_blocking) for name, array in self.arrays.items()}
        return StoredRows(arrays, self.missing, self.samples)

    def pin_memory(self) -> StoredRows:
        return StoredRows({name: array.pin_memory() for name, array in self.arrays.items()}, self.missing, self.samples)

    def part(self, start: int, stop: int) -> StoredRows:
        here = (self.missing >= start) & (self.missing < stop)
        arrays = {name: array[start:stop] for name, array in self.arrays.items()}
        return StoredRows(arrays, self.missing[here] - start, self.samples[start:stop])


@dataclass(frozen=True, slots=True)
class Batch:
    """The same views of the same samples, once for each model (`student`, `teacher`, ...), in the same order.

    `captions` are the texts that were tokenised; `view` is the view number of every sample in the batch. `stored` holds
    what a cache has of a model's answers, by role; such a model's input may lack images, or be left out.
    """

    ids: tuple[str, ...]
    inputs: dict[str, ModelInput]
    captions: tuple[str, ...]
    view: int = 0
    bad: tuple[tuple[str, str], ...] = field(default=())  # (id, reason) of samples skipped while making this batch
    extra: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, StoredRows] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False, *, images: bool = True) -> Batch:
        """The batch on a device; without `images` its pixels stay where they are."""
        inputs = {role: each.to(device, non_blocking, images=images) for role, each in self.inputs.items()}
        stored = {role: rows.to(device, non_blocking) for role, rows in self.stored.items()}
        return Batch(self.ids, inputs, self.captions, self.view, self.bad, self.extra, stored)

    def pin_memory(self) -> Batch:
        inputs = {role: model_input.pin_memory() for role, model_input in self.inputs.items()}
        stored = {role: rows.pin_memory() for role, rows in self.stored.items()}
        return Batch(self.ids, inputs, self.captions, self.view, self.bad, self.extra, stored)

    def only(self, role: str) -> Batch:
        """The batch with what one role reads, so that nothing else is moved for it."""
        inputs = {role: self.inputs[role]} if role in self.inputs else {}
        stored = {role: self.stored[role]} if role in self.stored else {}
        return replace(self, inputs=inputs, stored=stored, extra={})

    def part(self, start: int, stop: int) -> Batch:
        """The pairs from `start` to before `stop`, as slices of the same tensors."""
        inputs = {role: each.part(start, stop) for role, each in self.inputs.items() if role not in self.stored}
        for role, rows in self.stored.items():
            if role in self.inputs:  # it holds images of the missing places only
                first, last = (int((rows.missing < place).sum()) for place in (start, stop))
                inputs[role] = self.inputs[role].part(start, stop, images=(first, last))
        stored = {role: rows.part(start, stop) for role, rows in self.stored.items()}
        return Batch(self.ids[start:stop], inputs, self.captions[start:stop], self.view, self.bad, self.extra, stored)

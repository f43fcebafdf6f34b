"""The two types every part of the toolkit exchanges about data: a `Sample` of a source, and a `Batch` of views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from cmapkd.data.check import NO_CAPTION
from cmapkd.data.extras import move_extra, once, part_of_extra, pin_extra, same
from cmapkd.data.tokens import TokenBatch as TokenBatch
from cmapkd.data.turns import Dialogue

T = TypeVar("T")

MAIN_VIEW = "main"


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

    `id` is the question's own where the data numbers its questions, as result files name it. `category` groups
    questions that are scored apart, as POPE does; None where the data name none.
    """

    question: str
    answers: tuple[str, ...]
    kind: str = "other"
    id: str | None = None
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with everything that is said of it.

    `id` is stable: the same sample has the same id in every process, run and order of reading; views and caches are
    keyed by it. `image` is RGB, upright (EXIF applied) and of any size. `texts` are further texts by pool: `synthetic`
    are captions that a model wrote, other pools what the user named. `turns` are a dialogue about the image; where one
    stands there that cannot be used, `no_turns` says why, and the rest of the sample is good.
    """

    id: str
    image: Image.Image
    captions: tuple[str, ...] = ()
    label: int | None = None
    questions: tuple[QuestionAnswer, ...] = ()
    boxes: tuple[Box, ...] = ()
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    turns: Dialogue = ()
    no_turns: str | None = None

    def renamed(self, sample_id: str) -> Sample:
        """The same sample under another id."""
        return replace(self, id=sample_id)

    def without_label(self) -> Sample:
        """The same sample, unlabelled."""
        return replace(self, label=None)

    def without_captions(self) -> Sample:
        """The same sample with one caption, which is empty, and no further texts."""
        return replace(self, captions=("",), texts={})


class BadSampleError(ValueError):
    """A sample that cannot be used, with its id and the reason; what follows is the run's `on_bad_sample`."""

    def __init__(self, sample_id: str, reason: str, passing: bool = False) -> None:
        """See the class; `passing` where the sample may be good, and what holds it cannot be had now."""
        super().__init__(f"sample {sample_id!r}: {reason}")
        self.sample_id = sample_id
        self.reason = reason
        self.passing = passing

    @property
    def silent(self) -> bool:
        """Whether nothing is wrong with the sample but that it has no caption: it is replaced, and counted apart."""
        return self.reason.startswith(NO_CAPTION)

    def __reduce__(self) -> tuple[type[BadSampleError], tuple[str, str, bool]]:
        """Crosses a worker process whole: an exception is rebuilt from its own arguments, not from its message."""
        return type(self), (self.sample_id, self.reason, self.passing)


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


class Input(Protocol):
    """One model's own form of a batch: `ModelInput` of two towers, `dialogues.ChatInput` of a model that writes."""

    @property
    def texts(self) -> TokenBatch: ...

    def to(self, device: torch.device | str, non_blocking: bool = False, *, images: bool = True) -> Self:
        """On a device; without `images` the pictures stay where they are."""
        ...

    def pin_memory(self) -> Self: ...

    def part(self, start: int, stop: int, images: tuple[int, int] | None = None) -> Self:
        """The samples from `start` to before `stop`.

        Args:
            images: where their pictures stand, of an input that holds the pictures of some samples only.
        """
        ...

    def changed(self, change: Callable[[Tensor], Tensor], change_texts: Callable[[Tensor], Tensor]) -> Self:
        """With `change` of the tensors of pictures, and `change_texts` of those of tokens."""
        ...


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One model's own form of the batch: pixels after its resize, ids of its tokenizer.

    Pixels are bytes until the model reads them on its device: `image_spec.to_model` normalises them there, so models of
    one size share them. Floating-point pixels are normalised already.

    Attributes:
        images: UInt8[batch 3 height width] or Float[batch 3 height width], the main view.
        texts: the caption of each sample, Int[batch length].
        more_texts: by pool, `per_sample` further texts of each sample, Int[batch*per_sample length].
        more_images: by name of the view, [batch*count 3 height width] likewise: all `count` views of the first sample,
            then all of the second.
    """

    images: Tensor
    texts: TokenBatch
    more_texts: dict[str, TokenBatch] = field(default_factory=dict)
    more_images: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, view: str) -> Tensor:
        """The pixels of a view; `main` is `images`.

        Raises:
            KeyError: the batch does not bring this view.
        """
        if view == MAIN_VIEW:
            return self.images
        if view not in self.more_images:
            known = ", ".join((MAIN_VIEW, *self.more_images))
            raise KeyError(f"the batch brings no view {view!r}, only {known}: a method asks for it in `more_views`")
        return self.more_images[view]

    def to(self, device: torch.device | str, non_blocking: bool = False, *, images: bool = True) -> ModelInput:
        return self.changed(
            (lambda pixels: pixels.to(device, non_blocking=non_blocking)) if images else same,
            lambda tokens: tokens.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> ModelInput:
        return self.changed(torch.Tensor.pin_memory, torch.Tensor.pin_memory)

    def part(self, start: int, stop: int, images: tuple[int, int] | None = None) -> ModelInput:
        """The pairs from `start` to before `stop`; `images` says where their pixels stand, if elsewhere."""
        size = max(1, len(self.texts.ids) // self.texts.per_sample)
        counts = {view: len(pixels) // size for view, pixels in self.more_images.items()}
        return ModelInput(
            self.images[slice(*(images or (start, stop)))],
            self.texts.part(start, stop),
            {pool: texts.part(start, stop) for pool, texts in self.more_texts.items()},
            {view: self.more_images[view][start * count : stop * count] for view, count in counts.items()},
        )

    def changed(self, change: Callable[[Tensor], Tensor], change_texts: Callable[[Tensor], Tensor]) -> ModelInput:
        """With `change` of the pixels of every view, and `change_texts` of the tokens of every pool."""
        return ModelInput(
            change(self.images),
            self.texts.changed(change_texts),
            {pool: texts.changed(change_texts) for pool, texts in self.more_texts.items()},
            {view: change(pixels) for view, pixels in self.more_images.items()},
        )


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A model's stored answers to a batch, as they lie on disk, and the samples of the batch without an answer.

    Attributes:
        arrays: [batch ...] by the name of the field, in the numbers that are stored; zeros where there is no answer.
        missing: Int[missing], rows of the batch without an answer, ascending: `ModelInput.images` holds exactly these.
        samples: Int[batch], where each sample stands in the source.
    """

    arrays: dict[str, Tensor]
    missing: Tensor
    samples: Tensor

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

    Attributes:
        ids: of the samples.
        inputs: by role. A role with `stored` answers may lack images, or be left out.
        captions: the texts that were tokenised; of dialogues the answers.
        view: the view number of the samples; where streams are mixed, of those of the main stream.
        bad: (id, reason) of samples skipped while making this batch.
        extra: what `Extra`s made of the samples, by name. Each value has one row for each sample, or a method
            `part(start, stop)`; see `extras.part_of_extra`.
        stored: what a cache has of a model's answers, by role.
        streams: the stream that each sample is of; empty where there is one.
        views: the view number of each sample; empty where it is `view` for all.
        held_out: pairs that are never trained on, for the student alone, in some steps of a run that has any; a part
            of a batch has none. See `held_out.WithHeldOut`.
    """

    ids: tuple[str, ...]
    inputs: Mapping[str, Input]
    captions: tuple[str, ...]
    view: int = 0
    bad: tuple[tuple[str, str], ...] = field(default=())
    extra: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, StoredRows] = field(default_factory=dict)
    streams: tuple[str, ...] = ()
    views: tuple[int, ...] = ()
    held_out: Batch | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def pairs(self, role: str) -> ModelInput:
        """What a role of two towers reads.

        Raises:
            TypeError: the role reads dialogues.
        """
        found = self.inputs[role]
        if not isinstance(found, ModelInput):
            raise TypeError(
                f"the {role} reads {type(found).__name__}, where pixels and captions of two towers are needed"
            )
        return found

    @property
    def view_of_each(self) -> tuple[int, ...]:
        """The view number of each sample."""
        return self.views or (self.view,) * len(self)

    def to(self, device: torch.device | str, non_blocking: bool = False, *, images: bool = True) -> Batch:
        """The batch on a device; without `images` its pixels stay where they are. What roles share is moved once."""
        pixels = once(lambda tensor: tensor.to(device, non_blocking=non_blocking)) if images else same
        texts = once(lambda tokens: tokens.to(device, non_blocking=non_blocking))
        other = self.held_out
        few = other is None or len(other) <= len(self)  # more are encoded in parts, and moved then
        return replace(
            self,
            inputs=_changed(self.inputs, pixels, texts),
            extra={name: move_extra(value, device, non_blocking) for name, value in self.extra.items()},
            stored={role: rows.to(device, non_blocking) for role, rows in self.stored.items()},
            held_out=None if other is None else other.to(device, non_blocking, images=images and few),
        )

    def pin_memory(self) -> Batch:
        pixels, texts = once(torch.Tensor.pin_memory), once(torch.Tensor.pin_memory)
        return replace(
            self,
            inputs=_changed(self.inputs, pixels, texts),
            extra={name: pin_extra(value) for name, value in self.extra.items()},
            stored={role: rows.pin_memory() for role, rows in self.stored.items()},
            held_out=None if self.held_out is None else self.held_out.pin_memory(),
        )

    def only(self, role: str) -> Batch:
        """The batch with what one role reads, so that nothing else is moved for it."""
        inputs = {role: self.inputs[role]} if role in self.inputs else {}
        stored = {role: self.stored[role]} if role in self.stored else {}
        return replace(self, inputs=inputs, stored=stored, extra={}, held_out=None)

    def part(self, start: int, stop: int) -> Batch:
        """The pairs from `start` to before `stop`, as slices of the same tensors. `bad` stays as it is.

        Raises:
            TypeError, ValueError: a value of `extra` cannot be cut to a part of the samples.
        """
        inputs: dict[str, Input] = {
            role: each.part(start, stop) for role, each in self.inputs.items() if role not in self.stored
        }
        for role, rows in self.stored.items():
            if role in self.inputs:  # it holds images of the missing places only
                first, last = (int((rows.missing < place).sum()) for place in (start, stop))
                inputs[role] = self.inputs[role].part(start, stop, images=(first, last))
        size = len(self)
        return replace(
            self,
            ids=self.ids[start:stop],
            inputs=inputs,
            captions=self.captions[start:stop],
            extra={name: part_of_extra(value, start, stop, size=size, name=name) for name, value in self.extra.items()},
            stored={role: rows.part(start, stop) for role, rows in self.stored.items()},
            streams=self.streams[start:stop],
            views=self.views[start:stop],
            held_out=None,
        )


def _changed(
    inputs: Mapping[str, Input], change: Callable[[Tensor], Tensor], change_texts: Callable[[Tensor], Tensor]
) -> dict[str, Input]:
    """By role. Roles that have one input before have one afterwards."""
    changed = once(lambda each: each.changed(change, change_texts))
    return {role: changed(each) for role, each in inputs.items()}

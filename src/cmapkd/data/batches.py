"""Batches as pure functions of a plan: which views and texts of its samples, for which model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cmapkd.config import ConfigError
from cmapkd.data.memory import SampleMemory
from cmapkd.data.plans import Plan, PlanSampler
from cmapkd.data.random import permuted
from cmapkd.data.streams import MAIN_STREAM, Stream, streams_of
from cmapkd.data.texts import TextChoice, joined
from cmapkd.data.types import BadSampleError, Batch, ModelInput, Sample, Source, StoredRows, TokenBatch
from cmapkd.data.views import CropBox, View, ViewSpec, check_more_views, draw_more_view, draw_view
from cmapkd.data.workers import ReadAhead

_TEXTS_KEPT = 100_000  # samples
_NO_PICTURE = Image.new("RGB", (1, 1))
MAX_REPLACEMENTS = 100  # tries before a batch gives up finding a readable sample


class Preprocessing(Protocol):
    """A model's own way from pixels and texts to its input; see `models.ImageSpec` and `models.Tokenizer`."""

    def __call__(self, image: Image.Image, box: CropBox | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Reader:
    """How one model reads a batch."""

    preprocess: Preprocessing
    tokenize: Callable[[Sequence[str]], TokenBatch]

    def input(
        self,
        images: Tensor,
        captions: Sequence[str],
        more: Mapping[str, Sequence[str]] | None = None,
        more_images: Mapping[str, Tensor] | None = None,
    ) -> ModelInput:
        """The model's input.

        Args:
            images: its own pixels of the main views, Float[batch 3 height width].
            captions: one text of each sample.
            more: by pool one or more texts of each sample, those of a sample together (`TextChoice.columns`).
            more_images: its own pixels of further views by name, those of a sample together.
        """
        texts = {
            pool: replace(self.tokenize([*texts]), per_sample=len(texts) // len(captions))
            for pool, texts in (more or {}).items()
        }
        return ModelInput(images, self.tokenize([*captions]), texts, dict(more_images or {}))


class Answers(Protocol):
    """A model's answers to views, read instead of computed; see `cache.CacheReader`. Picklable."""

    needs_texts: bool  # whether the model's own tokens are read beside the answers

    def has(self, view: int, index: int) -> bool:
        """Whether the answer to a view of the sample at `index` is there."""
        ...

    def read(
        self,
        view: int | Sequence[int],
        indices: Sequence[int],
        ids: Sequence[str],
        captions: Sequence[str],
        missing: Sequence[int],
    ) -> StoredRows:
        """The answers to one view of these samples with these texts (`texts.joined`), except in the `missing` places.

        Args:
            view: the view's number, one for all samples or one for each.
        Raises:
            ValueError: an answer is to another sample, view or caption, or damaged.
        """
        ...


class Extra(Protocol):
    """Something else that a batch brings of its samples, made where these are read. Picklable."""

    def read(self, sample: Sample, view: View, epoch: int) -> Any:
        """Of one sample, what is kept when its picture is gone.

        Args:
            view: what the batch shows of the picture: its crop, in pixels of the original, its flip and its colours.
            epoch: the sample's own, from 0.
        Raises:
            BadSampleError: the sample cannot be used; another takes its place.
        """
        ...

    def join(self, items: Sequence[Any]) -> Any:
        """Of the batch: one row for each item, or an object with `part(start, stop)`; see `Batch.extra`."""
        ...


class Batches(Protocol):
    """What a trainer steps through: the batch of a plan, and as many items in an epoch as `source` has."""

    @property
    def source(self) -> Sized: ...

    def __getitem__(self, plan: Plan) -> Batch: ...

    def bytes_of(self, size: int) -> int:
        """About the bytes of a batch of `size` samples, to bound how many are made ahead."""
        ...


class BatchBuilder(Dataset[Batch]):
    """Turns a plan into a batch: reads samples, draws views, lets each model preprocess and tokenise its own way.

    A sample that cannot be read is replaced by another that is not in the batch (chosen by the step and the bad one, so
    the same after a resume) and reported in `Batch.bad`; with `on_bad_sample="error"` it stops the run instead.

    A role with `stored` answers gets these, and images only of the samples that they lack. Where every role has them
    and nothing else reads the pictures, pictures are not even decoded, of sources that know ids without reading (`id`).
    What `extras` make of the samples is in `Batch.extra`, by their names. `texts` says which texts a batch brings of
    each sample. Up to `memory` MiB of decoded samples are kept for later epochs.

    Args:
        more_views: by name, how many further views a method reads of each sample. A role with stored answers gets none
            of them: nobody is there to encode them.
        view_specs: what the further views may be, by name (`data.more_views`).
    Raises:
        ConfigError: a further view is asked for that no spec describes.
    """

    def __init__(
        self,
        source: Source,
        views: ViewSpec,
        readers: dict[str, Reader],
        *,
        seed: int,
        on_bad_sample: str = "skip",
        stored: Mapping[str, Answers] | None = None,
        extras: Mapping[str, Extra] | None = None,
        texts: TextChoice | None = None,
        memory: int = 0,
        more_views: Mapping[str, int] | None = None,
        view_specs: Mapping[str, ViewSpec] | None = None,
    ) -> None:
        self.samples = SampleMemory(source, memory)
        self.views, self.readers, self.seed = views, readers, seed
        self.skip_bad = on_bad_sample == "skip"
        self.stored = dict(stored or {})
        self.extras = dict(extras or {})
        self.texts = texts or TextChoice()
        self.more_views, self.view_specs = dict(more_views or {}), dict(view_specs or {})
        check_more_views(self.more_views, self.view_specs)
        self._live = [role for role in readers if role not in self.stored]
        self._texts_read: dict[int, Sample] = {}
        plain = self.texts.plain and not self.extras and not self.more_views
        self._may_be_unseen = plain and not self._live and bool(self.stored) and hasattr(source, "id")
        self._streams = streams_of(source) or (Stream(MAIN_STREAM, 0, len(source)),)

    @property
    def source(self) -> Source:
        return self.samples.source

    def bytes_of(self, size: int) -> int:
        """About the bytes of a batch of `size` samples: its pixels, without those that a cache lacks."""
        views = 1 + sum(self.more_views.values())
        dot = Image.new("RGB", (1, 1))
        distinct = {self.readers[role].preprocess for role in self._live}
        return size * views * sum(preprocess(dot).nbytes for preprocess in distinct)

    def __getitem__(self, plan: Plan) -> Batch:
        made = _Rows(self.readers, self.more_views, self.stored, self.extras)
        taken = set(plan.everyone)
        for row, planned in enumerate(plan.mine):
            epoch = plan.epochs[row] if plan.epochs else plan.epoch
            for index in self._candidates(plan, planned, taken):
                try:
                    self._add(made, index, epoch)
                except BadSampleError as error:
                    if not self.skip_bad:
                        raise
                    made.bad.append((error.sample_id, error.reason))
                    continue
                break
            else:
                sample_id, reason = made.bad[-1]
                raise BadSampleError(
                    sample_id, f"{reason}; and no readable sample was found to take its place at step {plan.step}"
                )
        captions, more_texts = self.texts.columns(made.texts)
        inputs = self._inputs(made, captions, more_texts)
        extra = {name: self.extras[name].join(items) for name, items in made.extras.items()}
        return Batch(
            tuple(made.ids),
            inputs,
            captions,
            view=self.views.view_number(plan.epoch),
            bad=tuple(made.bad),
            extra=extra,
            stored=self._answers(made),
            streams=plan.streams,
            views=tuple(made.views) if plan.epochs else (),
        )

    def _add(self, made: _Rows, index: int, epoch: int) -> None:
        """Reads one sample into the rows of a batch, all of it or nothing.

        Raises:
            BadSampleError: it cannot be used.
        """
        number = self.views.view_number(epoch)
        lacking = [role for role, answers in self.stored.items() if not answers.has(number, index)]
        sample = self.samples[index] if lacking or not self._may_be_unseen else self._unseen(index)
        view = draw_view(sample.id, number, self.views, sample.image.size)
        texts = self.texts.choose(sample, view, number)
        images = self._read(sample.image, view, [*self._live, *lacking])
        further = {
            name: [
                self._read(
                    sample.image,
                    draw_more_view(sample.id, number, name, place, self.view_specs[name], sample.image.size),
                    self._live,
                )
                for place in range(count)
            ]
            for name, count in self.more_views.items()
        }
        items = {name: extra.read(sample, view, epoch) for name, extra in self.extras.items()}
        for role in lacking:
            made.missing[role].append(len(made.ids))
        made.ids.append(sample.id)
        made.indices.append(index)
        made.views.append(number)
        made.texts.append(texts)
        for role, image in images.items():
            made.pixels[role].append(image)
        for name, shown in further.items():
            for each in shown:
                for role, image in each.items():
                    made.more_pixels[name][role].append(image)
        for name, item in items.items():
            made.extras[name].append(item)

    def _unseen(self, index: int) -> Sample:
        """A sample without its picture, which nobody looks at where every answer is stored.

        What a view draws besides the crop does not depend on the picture's size, so its caption is the same. Texts of
        the first samples are kept for later epochs: reading them costs more than reading the answers.
        """
        known = self._texts_read.get(index)
        if known is None:
            source: Any = self.source
            known = Sample(source.id(index), _NO_PICTURE, source.captions(index))
            if len(self._texts_read) < _TEXTS_KEPT:
                self._texts_read[index] = known
        return known

    def _answers(self, made: _Rows) -> dict[str, StoredRows]:
        answered = [joined(texts) for texts in made.texts]
        views: int | list[int] = made.views[0] if len(set(made.views)) == 1 else made.views
        return {
            role: answers.read(views, made.indices, made.ids, answered, made.missing[role])
            for role, answers in self.stored.items()
        }

    def _candidates(self, plan: Plan, planned: int, taken: set[int]) -> Iterator[int]:
        """The planned sample, then others of its stream that are not in the batch."""
        yield planned
        stream = self._streams[bisect_right(self._streams, planned, key=lambda each: each.first) - 1]
        for attempt in range(MAX_REPLACEMENTS):
            start = np.array([attempt % stream.length])
            drawn = permuted(start, stream.length, "replacement", self.seed, plan.step, planned)
            index = stream.first + int(drawn[0])
            if index not in taken:
                taken.add(index)
                yield index

    def _read(self, image: Image.Image, view: View, roles: Iterable[str]) -> dict[str, Tensor]:
        """The view for each of `roles`, once per distinct preprocessing: models that agree on it share the tensor."""
        picture, box = view.prepare(image)
        done: dict[Preprocessing, Tensor] = {}
        images: dict[str, Tensor] = {}
        for role in roles:
            preprocess = self.readers[role].preprocess
            if preprocess not in done:
                done[preprocess] = preprocess(picture, box)
            images[role] = done[preprocess]
        return images

    def _inputs(
        self, made: _Rows, captions: Sequence[str], more_texts: Mapping[str, Sequence[str]]
    ) -> dict[str, ModelInput]:
        """By role. Models that agree on the preprocessing share the pixels, those of one tokenizer the tokens."""
        inputs: dict[str, ModelInput] = {}
        for role, reader in self.readers.items():
            if role in self.stored:
                if not (made.pixels[role] or self.stored[role].needs_texts):
                    continue
                images, more_images = torch.stack(made.pixels[role]) if made.pixels[role] else torch.empty(0), {}
            elif (like := next((other for other in inputs if self._same_pixels(role, other)), None)) is not None:
                images, more_images = inputs[like].images, inputs[like].more_images
            else:
                images = torch.stack(made.pixels[role])
                more_images = {name: torch.stack(pixels[role]) for name, pixels in made.more_pixels.items()}
            like = next((other for other in inputs if self.readers[other].tokenize == reader.tokenize), None)
            if like is None:
                inputs[role] = reader.input(images, captions, more_texts, more_images)
            else:
                inputs[role] = ModelInput(images, inputs[like].texts, inputs[like].more_texts, more_images)
        return inputs

    def _same_pixels(self, role: str, other: str) -> bool:
        return other not in self.stored and self.readers[role].preprocess == self.readers[other].preprocess


class _Rows:
    """What is read of the samples of a batch, row by row."""

    def __init__(
        self, roles: Iterable[str], more_views: Iterable[str], stored: Iterable[str], extras: Iterable[str]
    ) -> None:
        roles = tuple(roles)
        self.ids: list[str] = []
        self.indices: list[int] = []
        self.views: list[int] = []
        self.texts: list[tuple[str, ...]] = []
        self.missing: dict[str, list[int]] = {role: [] for role in stored}
        self.pixels: dict[str, list[Tensor]] = {role: [] for role in roles}
        self.more_pixels: dict[str, dict[str, list[Tensor]]] = {
            name: {role: [] for role in roles} for name in more_views
        }
        self.extras: dict[str, list[Any]] = {name: [] for name in extras}
        self.bad: list[tuple[str, str]] = []


def make_loader(
    builder: Batches, sampler: PlanSampler, *, workers: int, pin_memory: bool, timeout: float = 0.0
) -> Generator[Batch]:
    """Batches in the sampler's order, made by `workers` processes (0: by this one), none of which may take longer than
    `timeout` seconds (0: any time). See `ReadAhead`.
    """

    def name(plan: Plan) -> str:
        samples = ", ".join(map(str, plan.mine[:8])) + ", ..." * (len(plan.mine) > 8)
        return f"the batch of step {plan.step + 1}, samples {samples}"

    ahead = ReadAhead(
        _Carrying(builder),
        sampler,
        workers=workers,
        pin_memory=pin_memory,
        timeout=timeout,
        item_bytes=builder.bytes_of(sampler.batch_size // sampler.world_size) if workers else 0,
        name=name,
    )
    for made in ahead:
        if isinstance(made, ValueError):
            raise made
        yield made


class _Carrying(Dataset["Batch | ValueError"]):
    """Hands an error about the data over as a value: raised in a worker, torch would make another error of it."""

    def __init__(self, builder: Batches) -> None:
        self.builder = builder

    def __getitem__(self, plan: Plan) -> Batch | ValueError:
        try:
            return self.builder[plan]
        except (BadSampleError, ConfigError) as error:
            return error

"""Batches as pure functions of the step: which samples, which views, which captions, for which model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cmapkd.data.memory import SampleMemory
from cmapkd.data.random import permuted
from cmapkd.data.texts import TextChoice, joined
from cmapkd.data.types import BadSampleError, Batch, ModelInput, Sample, Source, StoredRows, TokenBatch
from cmapkd.data.views import CropBox, View, ViewSpec, draw_view
from cmapkd.data.workers import ReadAhead

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
        self, images: Tensor, captions: Sequence[str], more: Mapping[str, Sequence[str]] | None = None
    ) -> ModelInput:
        """The model's input: its own pixels, and the texts by its own tokenizer, further ones by pool."""
        return ModelInput(
            images, self.tokenize([*captions]), {pool: self.tokenize([*texts]) for pool, texts in (more or {}).items()}
        )


class Answers(Protocol):
    """A model's answers to views, read instead of computed; see `cache.CacheReader`. Picklable."""

    needs_texts: bool  # whether the model's own tokens are read beside the answers

    def has(self, view: int, index: int) -> bool:
        """Whether the answer to a view of the sample at `index` is there."""
        ...

    def read(
        self, view: int, indices: Sequence[int], ids: Sequence[str], captions: Sequence[str], missing: Sequence[int]
    ) -> StoredRows:
        """The answers to one view of these samples with these texts (`texts.joined`), except in the `missing` places.

        Raises:
            ValueError: an answer is to another sample, view or caption, or damaged.
        """
        ...


class Extra(Protocol):
    """Something else that a batch brings of its samples, made where these are read. Picklable."""

    def read(self, sample: Sample, epoch: int) -> Any:
        """Of one sample, what is kept when its picture is gone."""
        ...

    def join(self, items: Sequence[Any]) -> Any:
        """Of the batch."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """The samples of one step: every process knows the whole batch and makes its own part."""

    step: int
    epoch: int
    everyone: tuple[int, ...]  # indices of the global batch
    mine: tuple[int, ...]  # the part of this process


class PlanSampler(Sampler[Plan]):
    """Plans for steps `start` to `stop`: every epoch is a new permutation; what does not fill a batch is left out.

    Random access by step, so resume inside an epoch costs nothing and needs no state but the step.
    """

    def __init__(
        self, length: int, *, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if length < batch_size:
            raise ValueError(
                f"the training data has {length} samples, fewer than one batch of {batch_size}: lower "
                "training.batch_size"
            )
        if batch_size % world_size:
            raise ValueError(
                f"batch size {batch_size} does not divide among {world_size} processes, whose shares must be equal: "
                "set training.batch_size to a multiple, or start another number of processes"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self.steps_per_epoch = length // batch_size

    def plan(self, step: int) -> Plan:
        epoch, position = divmod(step, self.steps_per_epoch)
        everyone = tuple(self.order(epoch, position, position + 1).tolist())
        share = self.batch_size // self.world_size
        return Plan(step, epoch, everyone, everyone[self.rank * share : (self.rank + 1) * share])

    def order(self, epoch: int, first: int, last: int) -> NDArray[np.int64]:
        """The samples of an epoch's batches `first` to `last`, one after the other."""
        positions = np.arange(first * self.batch_size, last * self.batch_size)
        return permuted(positions, self.length, "order", self.seed, epoch)

    def __iter__(self) -> Iterator[Plan]:
        return (self.plan(step) for step in range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop - self.start


class Batches(Protocol):
    """What a trainer steps through: the batch of a plan, and as many items in an epoch as `source` has."""

    @property
    def source(self) -> Sized: ...

    def __getitem__(self, plan: Plan) -> Batch: ...


class BatchBuilder(Dataset[Batch]):
    """Turns a plan into a batch: reads samples, draws views, lets each model preprocess and tokenise its own way.

    A sample that cannot be read is replaced by another that is not in the batch (chosen by the step and the bad one, so
    the same after a resume) and reported in `Batch.bad`; with `on_bad_sample="error"` it stops the run instead.

    A role with `stored` answers gets these, and images only of the samples that they lack. What `extras` make of the
    samples is in `Batch.extra`, by their names. `texts` says which texts a batch brings of each sample. Up to `memory`
    MiB of decoded samples are kept for later epochs.
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
    ) -> None:
        self.samples = SampleMemory(source, memory)
        self.views, self.readers, self.seed = views, readers, seed
        self.skip_bad = on_bad_sample == "skip"
        self.stored = dict(stored or {})
        self.extras = dict(extras or {})
        self.texts = texts or TextChoice()

    @property
    def source(self) -> Source:
        return self.samples.source

    def __getitem__(self, plan: Plan) -> Batch:
        number = self.views.view_number(plan.epoch)
        ids: list[str] = []
        indices: list[int] = []
        chosen: list[tuple[str, ...]] = []
        missing: dict[str, list[int]] = {role: [] for role in self.stored}
        pixels: dict[str, list[Tensor]] = {role: [] for role in self.readers}
        extras: dict[str, list[Any]] = {name: [] for name in self.extras}
        bad: list[tuple[str, str]] = []
        taken = set(plan.everyone)
        for planned in plan.mine:
            for index in self._candidates(plan, planned, taken):
                try:
                    sample = self.samples[index]
                    view = draw_view(sample.id, number, self.views, sample.image.size)
                    texts = self.texts.choose(sample, view, number)
                    lacking = [role for role, answers in self.stored.items() if not answers.has(number, index)]
                    images = self._read(sample.image, view, lacking)
                    more = {name: extra.read(sample, plan.epoch) for name, extra in self.extras.items()}
                except BadSampleError as error:
                    if not self.skip_bad:
                        raise
                    bad.append((error.sample_id, error.reason))
                    continue
                for role in lacking:
                    missing[role].append(len(ids))
                ids.append(sample.id)
                indices.append(index)
                chosen.append(texts)
                for role, image in images.items():
                    pixels[role].append(image)
                for name, item in more.items():
                    extras[name].append(item)
                break
            else:
                raise BadSampleError(
                    bad[-1][0], f"{bad[-1][1]}; and no readable sample was found to take its place at step {plan.step}"
                )
        answered = [joined(texts) for texts in chosen]
        stored = {
            role: answers.read(number, indices, ids, answered, missing[role]) for role, answers in self.stored.items()
        }
        captions, *further = zip(*chosen, strict=True)
        inputs = self._inputs(pixels, captions, dict(zip(self.texts.pools, further, strict=True)))
        extra = {name: self.extras[name].join(items) for name, items in extras.items()}
        return Batch(tuple(ids), inputs, captions, view=number, bad=tuple(bad), extra=extra, stored=stored)

    def _candidates(self, plan: Plan, planned: int, taken: set[int]) -> Iterator[int]:
        yield planned
        length = len(self.source)
        for attempt in range(MAX_REPLACEMENTS):
            start = np.array([attempt % length])
            index = int(permuted(start, length, "replacement", self.seed, plan.step, planned)[0])
            if index not in taken:
                taken.add(index)
                yield index

    def _read(self, image: Image.Image, view: View, lacking: Sequence[str]) -> dict[str, Tensor]:
        """The view once per distinct preprocessing: models that agree on it share the tensor."""
        picture, box = view.prepare(image)
        done: dict[Preprocessing, Tensor] = {}
        images: dict[str, Tensor] = {}
        for role, reader in self.readers.items():
            if role in self.stored and role not in lacking:
                continue
            if reader.preprocess not in done:
                done[reader.preprocess] = reader.preprocess(picture, box)
            images[role] = done[reader.preprocess]
        return images

    def _inputs(
        self, pixels: dict[str, list[Tensor]], captions: Sequence[str], more: Mapping[str, Sequence[str]]
    ) -> dict[str, ModelInput]:
        stacked: dict[Preprocessing, Tensor] = {}
        inputs: dict[str, ModelInput] = {}
        for role, reader in self.readers.items():
            if role in self.stored:
                if pixels[role] or self.stored[role].needs_texts:
                    images = torch.stack(pixels[role]) if pixels[role] else torch.empty(0)
                    inputs[role] = reader.input(images, captions, more)
                continue
            if reader.preprocess not in stacked:
                stacked[reader.preprocess] = torch.stack(pixels[role])
            inputs[role] = reader.input(stacked[reader.preprocess], captions, more)
        return inputs


def make_loader(
    builder: Batches, sampler: PlanSampler, *, workers: int, pin_memory: bool, timeout: float = 0.0
) -> Generator[Batch]:
    """Batches in the sampler's order, made by `workers` processes (0: by this one), none of which may take longer than
    `timeout` seconds (0: any time). See `ReadAhead`.
    """

    def name(plan: Plan) -> str:
        samples = ", ".join(map(str, plan.mine[:8])) + ", ..." * (len(plan.mine) > 8)
        return f"the batch of step {plan.step + 1}, samples {samples}"

    ahead = ReadAhead(_Carrying(builder), sampler, workers=workers, pin_memory=pin_memory, timeout=timeout, name=name)
    for made in ahead:
        if isinstance(made, BadSampleError):
            raise made
        yield made


class _Carrying(Dataset["Batch | BadSampleError"]):
    """Hands an unusable sample over as a value: raised in a worker, torch would make another error of it."""

    def __init__(self, builder: Batches) -> None:
        self.builder = builder

    def __getitem__(self, plan: Plan) -> Batch | BadSampleError:
        try:
            return self.builder[plan]
        except BadSampleError as error:
            return error

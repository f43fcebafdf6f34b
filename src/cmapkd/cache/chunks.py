"""Views for the teacher to answer, in chunks that depend on nothing but their place: made by data workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cmapkd.cache.identity import row_check
from cmapkd.cache.parts import Part
from cmapkd.data.batches import Reader
from cmapkd.data.texts import TextChoice, joined
from cmapkd.data.types import BadSampleError, ModelInput, Source
from cmapkd.data.views import ViewSpec, draw_view
from cmapkd.data.workers import ReadAhead


@dataclass(frozen=True, slots=True)
class Place:
    """Rows `first` to `last` of a shard."""

    part: int  # in the list of parts that are built
    shard: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The readable views of a place, and where in it they stand."""

    place: Place
    inputs: ModelInput | None  # none: nothing in it could be read
    checks: NDArray[np.uint64]  # of every row; 0 where the sample cannot be read
    ids: tuple[str, ...]  # of the readable ones
    bad: tuple[BadSampleError, ...]

    def pin_memory(self) -> Chunk:
        inputs = None if self.inputs is None else self.inputs.pin_memory()
        return Chunk(self.place, inputs, self.checks, self.ids, self.bad)


class Chunks(Dataset[Chunk]):
    """Reads, shows and tokenises exactly as `BatchBuilder` does for the same view of the same sample."""

    def __init__(
        self, source: Source, views: ViewSpec, reader: Reader, parts: Sequence[Part], texts: TextChoice
    ) -> None:
        self.source, self.views, self.reader, self.parts, self.texts = source, views, reader, parts, texts

    def __getitem__(self, place: Place) -> Chunk:
        keys = self.parts[place.part].keys(place.first, place.last)
        checks = np.zeros(len(keys), np.uint64)
        pixels: list[Tensor] = []
        ids: list[str] = []
        chosen: list[tuple[str, ...]] = []
        bad: list[BadSampleError] = []
        for row, key in enumerate(keys.tolist()):
            number, index = divmod(key, len(self.source))
            try:
                sample = self.source[index]
                view = draw_view(sample.id, number, self.views, sample.image.size)
                texts = self.texts.choose(sample, view, number)
                pixels.append(self.reader.preprocess(*view.prepare(sample.image)))
            except BadSampleError as error:
                bad.append(error)
                continue
            ids.append(sample.id)
            chosen.append(texts)
            checks[row] = row_check(sample.id, number, joined(texts))
        inputs = None
        if pixels:
            inputs = self.reader.input(torch.stack(pixels), *self.texts.columns(chosen))
        return Chunk(place, inputs, checks, tuple(ids), tuple(bad))


def places_of(part: Part, number: int, shards: Sequence[int]) -> list[Place]:
    """The chunks of these shards, in order; a chunk does not cross the end of a shard."""
    return [
        Place(number, shard, first, min(first + part.batch_size, part.extent(shard)[1]))
        for shard in shards
        for first in range(*part.extent(shard), part.batch_size)
    ]


def load_chunks(
    chunks: Chunks, places: list[Place], *, workers: int, pin_memory: bool, timeout: float = 0.0
) -> ReadAhead[Place, Chunk]:
    """The chunks in the order of `places`."""

    def name(place: Place) -> str:
        return f"rows {place.first} to {place.last} of the cache's part {place.part}"

    rows = max((place.last - place.first for place in places), default=0)
    return ReadAhead(
        chunks,
        places,
        workers=workers,
        pin_memory=pin_memory,
        timeout=timeout,
        item_bytes=rows * chunks.reader.preprocess(Image.new("RGB", (1, 1))).nbytes,
        name=name,
    )

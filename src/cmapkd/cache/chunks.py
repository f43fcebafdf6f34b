"""Views for the teacher to answer, in chunks that depend on nothing but their span: made by data workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from cmapkd.cache.identity import row_check
from cmapkd.cache.parts import CachePart
from cmapkd.data.batches import Choice
from cmapkd.data.readers import Reader, Shared
from cmapkd.data.records import Unusable
from cmapkd.data.types import BadSampleError, Input, Source
from cmapkd.data.views import ViewSpec, draw_view
from cmapkd.data.workers import ReadAhead


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Rows `first` to `last` of a shard."""

    part: int  # in the list of parts that are built
    shard: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The readable views of a span, and where in it they stand."""

    span: RowSpan
    inputs: Input | None  # none: nothing in it could be read
    checks: NDArray[np.uint64]  # of every row; 0 where the sample cannot be read
    ids: tuple[str, ...]  # of the readable ones
    bad: tuple[BadSampleError, ...]

    def pin_memory(self) -> Chunk:
        inputs = None if self.inputs is None else self.inputs.pin_memory()
        return Chunk(self.span, inputs, self.checks, self.ids, self.bad)


class Chunks(Dataset[Chunk]):
    """Reads, shows and tokenises exactly as `BatchBuilder` does for the same view of the same sample."""

    def __init__(
        self, source: Source, views: ViewSpec, reader: Reader, parts: Sequence[CachePart], texts: Choice
    ) -> None:
        self.source, self.views, self.reader, self.parts, self.texts = source, views, reader, parts, texts

    def __getitem__(self, span: RowSpan) -> Chunk:
        keys = self.parts[span.part].keys(span.first, span.last)
        checks = np.zeros(len(keys), np.uint64)
        items: list[Any] = []
        ids: list[str] = []
        chosen: list[Any] = []
        bad: list[BadSampleError] = []
        for row, key in enumerate(keys.tolist()):
            number, index = divmod(key, len(self.source))
            try:
                sample = self.source[index]
                view = draw_view(sample.id, number, self.views, sample.image.size)
                texts = self.texts.choose(sample, view, number)
                items.append(self.reader.read(*view.prepare(sample.image), texts))
            except BadSampleError as error:
                bad.append(error)
                continue
            except Unusable as error:
                bad.append(BadSampleError(sample.id, str(error)))
                continue
            ids.append(sample.id)
            chosen.append(texts)
            checks[row] = row_check(sample.id, number, self.texts.named(texts))
        inputs = None
        if items:
            inputs = self.reader.join(items, *self.texts.columns(chosen), {}, Shared())
        return Chunk(span, inputs, checks, tuple(ids), tuple(bad))


def spans_of(part: CachePart, number: int, shards: Sequence[int]) -> list[RowSpan]:
    """The chunks of these shards, in order; a chunk does not cross the end of a shard."""
    return [
        RowSpan(number, shard, first, min(first + part.batch_size, part.extent(shard)[1]))
        for shard in shards
        for first in range(*part.extent(shard), part.batch_size)
    ]


def load_chunks(
    chunks: Chunks, spans: list[RowSpan], *, workers: int, pin_memory: bool, timeout: float = 0.0
) -> ReadAhead[RowSpan, Chunk]:
    """The chunks in the order of `spans`."""

    def name(span: RowSpan) -> str:
        return f"rows {span.first} to {span.last} of the cache's part {span.part}"

    rows = max((span.last - span.first for span in spans), default=0)
    return ReadAhead(
        chunks,
        spans,
        workers=workers,
        pin_memory=pin_memory,
        timeout=timeout,
        item_bytes=rows * chunks.reader.bytes_of(1, chunks.source) if workers else 0,
        name=name,
    )

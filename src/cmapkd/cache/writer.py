"""Builds what is missing, shard by shard: any number of processes, stopped at any moment, the same bytes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmapkd.cache.chunks import Chunk, Chunks, load_chunks, spans_of
from cmapkd.cache.files import CacheError, digest_of_rows, explained, leftovers, new_file, write_json
from cmapkd.cache.folder import CacheFolder
from cmapkd.cache.known import KnownPictures
from cmapkd.cache.layout import RowLayout
from cmapkd.cache.parts import CachePart
from cmapkd.cache.rows import Fidelity, Layout
from cmapkd.cache.wanted import Wanted
from cmapkd.data.batches import Choice
from cmapkd.data.texts import TextChoice
from cmapkd.data.types import Source
from cmapkd.data.views import ViewSpec
from cmapkd.models import FrozenTeacher
from cmapkd.models.reading import reader_of

OnProgress = Callable[[int, int], None]  # rows done, rows to do, of this process


@dataclass
class BuildResult:
    """What one process did."""

    rows: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # (id, reason) of samples that cannot be read


@dataclass(frozen=True)
class MissingShards:
    """Shards of a part that have to be built for what was asked."""

    part: CachePart
    shards: tuple[int, ...]

    @property
    def rows(self) -> int:
        extents = [self.part.extent(shard) for shard in self.shards]
        return sum(last - first for first, last in extents)


def missing_shards(cache: CacheFolder, wanted: Wanted) -> tuple[list[MissingShards], Wanted]:
    """The shards that are to hold what is wanted and are not finished, and what no part is to hold yet."""
    missing: list[MissingShards] = []
    for part in cache.parts():
        finished = part.finished(repair=True)
        asked, wanted = part.take(wanted, finished)
        shards = tuple(shard for shard in asked if not finished[shard])
        if shards:
            missing.append(MissingShards(part, shards))
    return missing, wanted


def build(
    cache: CacheFolder,
    wanted: Wanted,
    *,
    teacher: FrozenTeacher,
    source: Source,
    views: ViewSpec,
    precision: str,
    batch_size: int,
    shard_bytes: float,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    skip_bad: bool = True,
    progress: OnProgress | None = None,
    texts: Choice | None = None,
    max_tokens: int | None = None,
    timeout: float = 0.0,
) -> BuildResult:
    """Adds the wanted answers that the cache lacks; of several processes each takes every `world_size`-th shard.

    Args:
        teacher: on the device where it shall answer.
        precision: `fp32`, or `bf16` for autocast, as the run will use.
        batch_size, shard_bytes: of new parts; one that was begun keeps its own.
        max_tokens: longest dialogue of a teacher that writes; None: as long as it takes.
        timeout: seconds that reading a batch may take; 0: any time.
        skip_bad: a sample that cannot be read gets a row that says so; otherwise it ends the build.
    Raises:
        CacheError: the disk is full or read-only, or an answer does not fit the stored numbers.
        BadSampleError: with `skip_bad=False`.
    """
    cache.begin_rows(batch_size=batch_size, shard_bytes=shard_bytes)
    folders = [cache.path, *(folder for part in cache.parts() for folder in part.folders())]
    for path in [path for folder in folders for path in leftovers(folder)]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    number = cache.next_part()
    while len(unknown := missing_shards(cache, wanted)[1]):  # again, if another builder began a part for other keys
        cache.add_part(unknown.listed(), number=number, batch_size=batch_size, shard_bytes=shard_bytes)
        number = cache.next_part()
    missing = missing_shards(cache, wanted)[0]
    assigned = [
        MissingShards(shards.part, tuple(shard for shard in shards.shards if shard % world_size == rank))
        for shards in missing
    ]
    reader = reader_of(teacher.model, max_tokens=max_tokens, fast=views.reading == "fast")
    chunks = Chunks(source, views, reader, [shards.part for shards in assigned], texts or TextChoice())
    spans = [span for number, shards in enumerate(assigned) for span in spans_of(shards.part, number, shards.shards)]
    total = sum(shards.rows for shards in assigned)
    built = BuildResult()
    device = teacher.model.device
    loader = load_chunks(chunks, spans, workers=workers, pin_memory=device.type == "cuda", timeout=timeout)
    answer = _RowMaker(cache.layout, teacher, device, precision, _known(cache.layout, views))
    with ExitStack() as stack:
        shard: _Shard | None = None
        for chunk in loader:
            for error in chunk.bad:
                if error.passing:
                    raise CacheError(
                        f"{error}. A row that says so would stay: build again when the store answers; finished shards "
                        "are kept"
                    )
                if error.silent:
                    continue
                if not skip_bad:
                    raise error
                built.bad.append((error.sample_id, error.reason))
            span = chunk.span
            part = assigned[span.part].part
            if shard is None:
                shard = stack.enter_context(_Shard(part, span.shard, cache.layout.fidelity()))
            samples = part.keys(span.first, span.last) % len(source)
            shard.write(answer(chunk, samples, shard.fidelity), num_bad=len(chunk.bad))
            built.rows += span.last - span.first
            if span.last == part.extent(span.shard)[1]:
                shard.finish()
                shard = None
            if progress is not None:
                progress(built.rows, total)
    return built


def _known(layout: Layout, views: ViewSpec) -> KnownPictures | None:
    """Pictures that need no second answer, where a teacher of two towers sees the same ones in every view."""
    if not isinstance(layout, RowLayout) or layout.key_tokens is not None or not views.shows_all:
        return None
    return KnownPictures(layout)


class _RowMaker:
    """A chunk to rows as they are stored."""

    def __init__(
        self, layout: Layout, teacher: FrozenTeacher, device: torch.device, precision: str, known: KnownPictures | None
    ) -> None:
        self.layout, self.teacher, self.device, self.precision = layout, teacher, device, precision
        self.known = known

    @torch.no_grad()
    def __call__(self, chunk: Chunk, samples: NDArray[np.int64], fidelity: Fidelity) -> Any:
        if chunk.inputs is None:
            return self.layout.rows({}, chunk.checks)
        inputs: Any = chunk.inputs.to(self.device, non_blocking=True)
        self.layout.check_inputs(inputs, chunk.ids)
        if self.known is None:
            live = self.layout.ask(self.teacher, inputs, self.precision)
        else:
            live = self.known.ask(self.teacher, inputs, self.precision, samples[chunk.checks != 0].tolist())
        encoded = self.layout.encode(live)
        stored = self.layout.decode(encoded)
        self._check(live, stored, chunk.ids)
        fidelity.add(live, stored)
        good = self.layout.rows(encoded, chunk.checks[chunk.checks != 0])
        rows = np.zeros(len(chunk.checks), self.layout.dtype)
        rows[chunk.checks != 0] = good
        return rows

    def _check(self, live: dict[str, Tensor], stored: dict[str, Tensor], ids: tuple[str, ...]) -> None:
        """Refuses answers that are not finite, in arrays [batch ...] by field.

        Raises:
            CacheError: names the field and the sample.
        """
        for name, array in live.items():
            if name not in stored or not array.is_floating_point():
                continue
            for values, why in ((array, "the teacher's answer"), (stored[name], f"its copy in {self.layout.store}")):
                finite = values.flatten(1).isfinite().all(1)
                if not bool(finite.all()):
                    first = ids[int((~finite).nonzero()[0])]
                    remedy = "check the teacher and its precision" if values is array else "use cache.store=fp32"
                    raise CacheError(f"{name} of sample {first!r} is not finite in {why}: {remedy}")


class _Overtaken(Exception):
    """Another builder has finished the same shard."""


class _Shard:
    """One shard under way: under another name until its last row is written; gone if it is not finished."""

    def __init__(self, part: CachePart, number: int, fidelity: Fidelity) -> None:
        self.part, self.number, self.fidelity = part, number, fidelity
        self._digest = hashlib.blake2b(digest_size=16)
        self._groups: list[int] = []
        self._group = b""  # rows of a group that is not full
        self._num_bad = 0
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> _Shard:
        temporary: Path = self._stack.enter_context(new_file(self.part.data(self.number)))
        self._file = self._stack.enter_context(temporary.open("wb"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, rows: Any, *, num_bad: int) -> None:
        assert self._file is not None
        data = rows.tobytes()
        with explained(self.part.folder):
            self._file.write(data)
        self._digest.update(data)
        self._group += data
        size = self.part.group_rows * self.part.row_bytes
        full = len(self._group) // size * size
        self._groups += [digest_of_rows(self._group[at : at + size]) for at in range(0, full, size)]
        self._group = self._group[full:]
        self._num_bad += num_bad

    def finish(self) -> None:
        """Renames the data into place, and writes the record; nothing where another builder has finished the shard."""
        if self.part.record(self.number).exists():
            self._stack.__exit__(_Overtaken, _Overtaken(), None)  # the file is removed
            return
        self._stack.close()
        first, last = self.part.extent(self.number)
        groups = [*self._groups, *([digest_of_rows(self._group)] if self._group else [])]
        record = {
            "rows": last - first,
            "bad": self._num_bad,
            "checksum": self._digest.hexdigest(),
            "group_rows": self.part.group_rows,
            "groups": np.array(groups, "<u8").tobytes().hex(),
            "fidelity": self.fidelity.plain(),
        }
        write_json(self.part.record(self.number), record)

"""Plans: which samples each step reads, as a pure function of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from cmapkd.config import ConfigError, closest, counted
from cmapkd.data.random import permuted
from cmapkd.data.streams import MAIN_STREAM, Cursor, Stream, interleaved, stream_sizes
from cmapkd.data.window_order import WindowOrder


@dataclass(frozen=True, slots=True)
class Plan:
    """The samples of one step: every process knows the whole batch and makes its own part.

    Attributes:
        step: from 0.
        epoch: of the main stream, or of the one that the step reads.
        everyone: indices of the global batch.
        mine: the part of this process.
        streams: the stream of each of `mine`; empty where there is one.
        epochs: the epoch of each of `mine`; empty where it is `epoch` for all.
    """

    step: int
    epoch: int
    everyone: tuple[int, ...]
    mine: tuple[int, ...]
    streams: tuple[str, ...] = ()
    epochs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Phase:
    """Steps in which every batch is composed alike: from when on, of each stream how many, and how far it was read."""

    first: int
    only: str | None
    sizes: tuple[int, ...]
    cursors: tuple[Cursor, ...]


def check_length(length: int, batch_size: int) -> None:
    """Refuses data that cannot fill one batch.

    Args:
        length: of the training data, in samples.
    Raises:
        ValueError: there are fewer samples than a batch takes.
    """
    if length < batch_size:
        raise ValueError(
            f"the training data has {counted(length, 'sample')}, fewer than one batch of {batch_size}: "
            "lower training.batch_size"
        )


class PlanSampler(Sampler[Plan]):
    """Plans for steps `start` to `stop`: every epoch is in a new order; what does not fill a batch is left out.

    Random access by step, so resume inside an epoch costs nothing and needs no state but the step.

    Args:
        length: number of samples, those of all streams together.
        streams: which samples are of which stream, its share of a batch and its order; none: all are one stream. Each
            stream has orders and epochs of its own.
        only: a function of the step, to the name of the one stream that it reads, or None for all by their shares.
    Raises:
        ValueError: fewer samples than a batch has, or a batch that does not divide among the processes.
        ConfigError: a stream gets no sample of a batch, or has too few.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
        streams: Sequence[Stream] = (),
        only: Callable[[int], str | None] | None = None,
    ) -> None:
        check_length(length, batch_size)
        if batch_size % world_size:
            raise ValueError(
                f"batch size {batch_size} does not divide among {world_size} processes, whose parts must be equal: "
                "set training.batch_size to a multiple, or start another number of processes"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self.streams = tuple(streams) or (Stream(MAIN_STREAM, 0, length),)
        self.only = only
        self._sizes = stream_sizes(batch_size, self.streams)
        self._rows = interleaved(self._sizes)
        self.steps_per_epoch = self.streams[0].length // self._sizes[0]
        self._phases: list[_Phase] = []
        self._known = 0  # steps whose phase is known

    def check_stream(self, name: str) -> None:
        """Refuses a stream that no step can read alone.

        Raises:
            ConfigError: there is no such stream, or it has fewer samples than a batch.
        """
        names = [stream.name for stream in self.streams]
        if name not in names:
            raise ConfigError(f"there is no stream {name!r}{closest(name, names)}. Known: {', '.join(names)}")
        length = self.streams[names.index(name)].length
        if length < self.batch_size:
            raise ConfigError(
                f"stream {name!r} has {counted(length, 'sample')}, fewer than one batch of {self.batch_size}, so no "
                "stage can read it alone: lower training.batch_size"
            )

    def check_shared_out(self) -> None:
        """Refuses streams of which the processes would have parts of different sizes.

        Raises:
            ConfigError: names such a stream.
        """
        for stream, size in zip(self.streams, self._sizes, strict=True):
            if size % self.world_size:
                raise ConfigError(
                    f"a batch has {counted(size, 'sample')} of stream {stream.name!r}, which do not divide among "
                    f"{self.world_size} processes, and this method needs parts of one size: change its share or "
                    "training.batch_size"
                )

    def plan(self, step: int) -> Plan:
        phase = self._phase(step)
        everyone = np.empty(self.batch_size, np.int64)
        epochs = np.empty(self.batch_size, np.int64)
        rows = self._rows_of(phase)
        for number, epoch, first in self._read_at(phase, step):
            here = rows == number
            everyone[here] = self.samples(number, epoch, first, first + phase.sizes[number])
            epochs[here] = epoch
        own = slice(*(self.batch_size // self.world_size * rank for rank in (self.rank, self.rank + 1)))
        everyone_listed = tuple(everyone.tolist())
        if len(self.streams) == 1:
            return Plan(step, int(epochs[0]), everyone_listed, everyone_listed[own])
        named = tuple(self.streams[number].name for number in rows[own].tolist())
        main = int(epochs[rows == 0][0]) if phase.sizes[0] else int(epochs[0])
        return Plan(step, main, everyone_listed, everyone_listed[own], named, tuple(epochs[own].tolist()))

    def reads(self, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """What the steps before `stop` read: the number of a stream, an epoch, and places in it, each time others."""
        if stop:
            self._phase(stop - 1)
        ends = [*(phase.first for phase in self._phases[1:]), stop]
        for phase, end in zip(self._phases, ends, strict=False):
            steps = min(end, stop) - phase.first
            for number, (size, cursor) in enumerate(zip(phase.sizes, phase.cursors, strict=True)):
                done = 0
                while size and done < steps:
                    length = self.streams[number].length
                    at = cursor.locate(done, size=size, length=length)
                    count = min((length - at.used) // size, steps - done)
                    yield number, at.epoch, at.used, at.used + count * size
                    done += count

    def place(self, number: int, step: int) -> tuple[int, int] | None:
        """The epoch that a step reads of a stream, and the place where it begins; None where it reads nothing of it."""
        found = (at for at in self._read_at(self._phase(step), step) if at[0] == number)
        return next(((epoch, first) for _, epoch, first in found), None)

    def own_lanes(self, order: WindowOrder) -> slice:
        """The lanes that this process reads, if only in part."""
        low, high = (order.lanes * rank / self.world_size for rank in (self.rank, self.rank + 1))
        return slice(math.floor(low), math.ceil(high))

    def samples(self, number: int, epoch: int, first: int, last: int) -> NDArray[np.int64]:
        """Where the samples at the places `first` to `last` of a stream's epoch are."""
        stream = self.streams[number]
        if stream.order is not None:
            return stream.first + stream.order.samples(epoch, first, last)
        named = (stream.name,) if number else ()
        return stream.first + permuted(np.arange(first, last), stream.length, "order", self.seed, epoch, *named)

    def _read_at(self, phase: _Phase, step: int) -> Iterator[tuple[int, int, int]]:
        """Of each stream that a step reads: its number, its epoch and the place where the step's samples begin."""
        for number, (size, cursor) in enumerate(zip(phase.sizes, phase.cursors, strict=True)):
            if size:
                at = cursor.locate(step - phase.first, size=size, length=self.streams[number].length)
                yield number, at.epoch, at.used

    def _rows_of(self, phase: _Phase) -> NDArray[np.int64]:
        if phase.only is None:
            return self._rows
        return np.full(self.batch_size, phase.sizes.index(self.batch_size))

    def _phase(self, step: int) -> _Phase:
        """The phase that a step is in. Phases are found from the first on, each step asked about once."""
        if not self._phases:
            self._phases.append(
                self._begin(0, None if self.only is None else self.only(0), [Cursor()] * len(self.streams))
            )
            self._known = 1
        while self.only is not None and self._known <= step:
            last, name = self._phases[-1], self.only(self._known)
            if name != last.only:
                steps = self._known - last.first
                cursors = [
                    cursor.after(steps, size=size, length=stream.length) if size else cursor
                    for cursor, size, stream in zip(last.cursors, last.sizes, self.streams, strict=True)
                ]
                self._phases.append(self._begin(self._known, name, cursors))
            self._known += 1
        return self._phases[bisect_right(self._phases, step, key=lambda phase: phase.first) - 1]

    def _begin(self, first: int, only: str | None, cursors: Sequence[Cursor]) -> _Phase:
        sizes = self._sizes
        if only is not None:
            self.check_stream(only)
            sizes = tuple(self.batch_size if stream.name == only else 0 for stream in self.streams)
        return _Phase(first, only, sizes, tuple(cursors))

    def __iter__(self) -> Iterator[Plan]:
        return self.skip(0)

    def skip(self, count: int) -> Iterator[Plan]:
        """All plans but the first `count`, which are not made."""
        return (self.plan(step) for step in range(self.start + count, self.stop))

    def __len__(self) -> int:
        return self.stop - self.start

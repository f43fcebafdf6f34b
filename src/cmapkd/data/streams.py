"""Streams: several sources that are read side by side, each with a stated share of every batch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from cmapkd.config import ConfigError, counted
from cmapkd.data.templates import class_prompts
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.data.unseen import unseen
from cmapkd.data.window_order import WindowOrder

MAIN_STREAM = "train"  # that of `data.train`


@dataclass(frozen=True, slots=True)
class Stream:
    """One of the sources that are read side by side.

    Attributes:
        name: `train`, or as in `data.more`.
        first: where its samples begin in the joined source.
        length: how many samples it has.
        share: fraction of each batch that are its samples, in (0, 1].
        order: in windows of shards; none: every epoch is a permutation of all samples.
    """

    name: str
    first: int
    length: int
    share: float = 1.0
    order: WindowOrder | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a stream has been read: `used` samples of `epoch`. What does not fill a step's part is left out."""

    epoch: int = 0
    used: int = 0

    def locate(self, step: int, *, size: int, length: int) -> Cursor:
        """Where the samples of a step begin, counted from here (0 is the next one); each step reads `size`."""
        left = (length - self.used) // size
        if step < left:
            return Cursor(self.epoch, self.used + step * size)
        epochs, place = divmod(step - left, length // size)
        return Cursor(self.epoch + 1 + epochs, place * size)

    def after(self, steps: int, *, size: int, length: int) -> Cursor:
        """How far the stream has been read after so many steps."""
        if not steps:
            return self
        last = self.locate(steps - 1, size=size, length=length)
        return Cursor(last.epoch, last.used + size)


def stream_sizes(batch_size: int, streams: Sequence[Stream]) -> tuple[int, ...]:
    """How many samples of each stream a batch has: the largest remainders of the shares are rounded up.

    Raises:
        ConfigError: a stream gets none, or has fewer samples than it should give to one batch.
    """
    exact = [Fraction(stream.share).limit_denominator(10**9) * batch_size for stream in streams]
    total = sum(exact, Fraction(0))
    exact = [part * batch_size / total for part in exact]  # shares written as decimals may miss 1 by a little
    sizes = [int(part) for part in exact]
    by_remainder = sorted(range(len(streams)), key=lambda place: sizes[place] - exact[place])
    for place in by_remainder[: batch_size - sum(sizes)]:
        sizes[place] += 1
    for stream, size in zip(streams, sizes, strict=True):
        if not size:
            raise ConfigError(
                f"stream {stream.name!r} has a share of {stream.share:g}, which is no sample of a batch of "
                f"{batch_size}: raise its share or training.batch_size"
            )
        if stream.length < size:
            raise ConfigError(
                f"stream {stream.name!r} has {counted(stream.length, 'sample')}, fewer than the {size} that each batch "
                f"of {batch_size} takes of it: lower its share or training.batch_size"
            )
    return tuple(sizes)


def interleaved(sizes: Sequence[int]) -> NDArray[np.int64]:
    """The stream of each row of a batch, spread evenly.

    Where a number of processes divides every size, each process's part of the rows has its share of every stream.
    """
    places = sorted(
        (Fraction(2 * number + 1, 2 * size), stream) for stream, size in enumerate(sizes) for number in range(size)
    )
    return np.array([stream for _, stream in places], dtype=np.int64)


class JoinedSource:
    """Sources one after the other, as one `Source`.

    Samples of the main stream keep their ids. Those of another get its name in front, `reference/000017.jpg`, because
    two data sets may number their samples alike.

    Args:
        sources: by the name of their stream, the main one first.
        shares: of the other streams, each in (0, 1), together below 1.
        hidden: streams whose samples have no label here, so that their classes need not be the others'.
        silent: streams whose samples have one empty caption here, whatever is said of them.
    Raises:
        ConfigError: the sources name their classes differently, or the shares leave nothing to the main stream.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        shares: Mapping[str, float],
        hidden: Collection[str] = (),
        silent: Collection[str] = (),
    ) -> None:
        self.sources = tuple(sources.values())
        self._hidden = frozenset(number for number, name in enumerate(sources) if name in hidden)
        self._silent = frozenset(number for number, name in enumerate(sources) if name in silent)
        main, *others = sources
        rest = 1.0 - sum(shares[name] for name in others)
        if rest <= 0:
            raise ConfigError(
                f"the shares of data.more add up to {1.0 - rest:g}, which leaves nothing of a batch to data.train: "
                "together they must be below 1"
            )
        self._starts = [0, *accumulate(len(source) for source in self.sources)]
        all_shares = {main: rest, **{name: shares[name] for name in others}}
        self.streams = tuple(
            Stream(name, start, len(source), all_shares[name])
            for (name, source), start in zip(sources.items(), self._starts, strict=False)
        )
        self.name = " + ".join(source.name for source in self.sources)
        self.templates: tuple[str, ...] = tuple(getattr(self.sources[0], "templates", ()))
        self._class_names = _agreed_classes({name: each for name, each in sources.items() if name not in hidden})

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, with the id that it has here.

        Raises:
            BadSampleError: it cannot be read.
        """
        return self._read(index, lambda source, place: source[place])

    def unseen(self, index: int) -> Sample:
        """The sample at `index` without its picture, where its source reads it so.

        Raises:
            BadSampleError: it cannot be read.
        """
        return self._read(index, unseen)

    def _read(self, index: int, read: Callable[[Source, int], Sample]) -> Sample:
        number, place = self._find(index)
        try:
            sample = read(self.sources[number], place)
        except BadSampleError as error:
            raise BadSampleError(self._id(number, error.sample_id), error.reason, error.passing) from None
        named = sample.renamed(self._id(number, sample.id)) if number else sample
        named = named.without_label() if number in self._hidden else named
        return named.without_captions() if number in self._silent else named

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the sample at `index`; its image is not read.

        Raises:
            BadSampleError: what is said of the image cannot be read.
        """
        number, place = self._find(index)
        if number in self._silent:
            return ("",)
        try:
            return self.sources[number].captions(place)
        except BadSampleError as error:
            raise BadSampleError(self._id(number, error.sample_id), error.reason, error.passing) from None

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {counted(len(self), 'sample')}, there is no sample {index}")
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def _id(self, number: int, sample_id: str) -> str:
        return f"{self.streams[number].name}/{sample_id}" if number else sample_id

    @property
    def class_names(self) -> Sequence[str] | None:
        """The names that the sources agree on; None where none names its labels."""
        return self._class_names

    @property
    def shown(self) -> tuple[Source, ...]:
        """The sources whose labels are not hidden here."""
        return tuple(source for number, source in enumerate(self.sources) if number not in self._hidden)

    @property
    def class_prompts(self) -> Sequence[Sequence[str]]:
        """The main source's texts of each class by itself, by label; empty where it has none."""
        return class_prompts(self.sources[0])

    def fingerprint(self) -> str:
        """Of the sources, their order and their streams' names; not of the shares, which are no data."""
        digest = blake2b(digest_size=16)
        for stream, source in zip(self.streams, self.sources, strict=True):
            digest.update(f"{stream.name}\0{source.fingerprint()}\0{stream.length}\0".encode())
        digest.update("".join(f"hidden {number}\0" for number in sorted(self._hidden)).encode())
        digest.update("".join(f"silent {number}\0" for number in sorted(self._silent)).encode())
        return digest.hexdigest()


def streams_of(source: object) -> tuple[Stream, ...]:
    """The streams that a source is joined from; none where it is one."""
    return source.streams if isinstance(source, JoinedSource) else ()


def _agreed_classes(sources: Mapping[str, Source]) -> tuple[str, ...] | None:
    named = {name: tuple(source.class_names) for name, source in sources.items() if source.class_names is not None}
    if not named:
        return None
    first, *others = named
    for other in others:
        if named[other] != named[first]:
            one, two = named[first], named[other]
            place = next((place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
            how = (
                f"class {place} is {one[place]!r} in one and {two[place]!r} in the other"
                if place is not None
                else f"one has {counted(len(one), 'class')}, the other {len(two)}"
            )
            raise ConfigError(
                f"streams {first!r} and {other!r} name their classes differently ({how}), so one label would mean two "
                "things: give both the same names with ?classes=FILE, or hide the labels of one with labels: hidden"
            )
    return named[first]

"""An order that reads few shards at a time: shards are permuted, and samples are mixed within windows of shards.

The shards of an epoch stand in a ring, in an order of that epoch. The ring is cut into equal lanes, at places of that
epoch, and each batch reads the same number of places from every lane. A lane is read window by window, and the samples
of a window are permuted. So as many shards are open as all windows hold at a time. Nothing is kept but the counts of
the shards: where the samples of a step lie is a function of the seed and the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cmapkd.config import counted
from cmapkd.data.random import key_of, permuted, permuted_each, unpermuted

Ints = NDArray[np.int64]
_EPOCHS = 2  # whose row of shards is kept: batches made ahead may be of the next one


class _Row(NamedTuple):
    """The row of shards of an epoch, as a ring.

    Attributes:
        shards: the number of each.
        begins: Int[shards + 1], where each begins.
        turn: where the first lane begins, anywhere in a shard. Else a sample's place in its shard would tell something
            of its time, because lanes and windows of all epochs begin alike.
    """

    shards: Ints
    begins: Ints
    turn: int


class WindowOrder:
    """The order of one stream's samples.

    Args:
        counts: samples of each shard, in the order in which they stand in the source; some may be 0.
        lanes: into how many pieces an epoch is cut. A step reads the same number of samples of each.
        rows: the largest number of samples that a step reads of one lane.
        window: shards whose samples are mixed, on average.
        seed: of the run.
        name: parts that tell this stream from the others.
    Attributes:
        length: samples of all shards.
        lane: samples of a lane. The `length` - `lanes` x `lane` last ones of an epoch's row are left out.
        size: samples of a window, a multiple of `rows`. The first and the last one of a lane may be cut.
    """

    def __init__(
        self, counts: ArrayLike, *, lanes: int, rows: int, window: int, seed: int, name: Sequence[object] = ()
    ) -> None:
        self.counts: Ints = np.asarray(counts, dtype=np.int64)
        self.length = int(self.counts.sum())
        self.lanes, self.rows, self.window, self.seed, self.name = lanes, rows, window, seed, tuple(name)
        full = max(1, int(np.count_nonzero(self.counts)))
        self.lane = self.length // lanes
        self.size = max(1, -(-window * self.length // (full * rows))) * rows
        self._starts = np.cumsum(self.counts) - self.counts
        # windows of the lanes end in turn, so that new shards are needed one after the other
        turns = np.array([_reversed_bits(lane, lanes) for lane in range(lanes)])
        self._phase = turns * self.size // (1 << (lanes - 1).bit_length()) // rows * rows
        last = (self.lane + self._phase) // self.size
        short = (self.lane + self._phase) % self.size < self.size // 2  # it joins the one before
        self._last = np.maximum(0, last - short)
        self._rows: dict[int, _Row] = {}

    def samples(self, epoch: int, first: int, last: int) -> Ints:
        """The samples at the places `first` to `last` of an epoch, lane after lane.

        Args:
            first, last: multiples of the number of lanes, in [0, `length`].
        Raises:
            ValueError: they are none.
        """
        if first % self.lanes or last % self.lanes or not 0 <= first <= last <= self.lanes * self.lane:
            raise ValueError(
                f"places {first} to {last} cannot be read in {self.lanes} lanes of {self.lane} samples: batches "
                "must have the size that the order was made for"
            )
        places = np.arange(first // self.lanes, last // self.lanes)
        lanes = np.repeat(np.arange(self.lanes), len(places))
        return self._at(epoch, lanes, np.tile(places, self.lanes))

    def instead_of(self, sample: int, epoch: int) -> Iterator[int]:
        """Others that may take the place of a planned sample, those of its window first.

        They are what its place in the lane's part of a batch shows in other steps. So no two samples of a step have one
        that is instead of both, and no process need know what another one took.
        """
        row = self._row(epoch)
        shard = int(np.searchsorted(self._starts, sample, "right")) - 1
        place = int(unpermuted(np.array([shard]), len(self.counts), *self._parts("shards", epoch))[0])
        at = int(row.begins[place]) + sample - int(self._starts[shard])
        lane, mixed = divmod((at - row.turn) % self.length, self.lane)
        number, begin, end = (int(each[0]) for each in self._window(np.array([lane]), np.array([mixed])))
        parts = self._parts("window", epoch, lane, number)
        own = begin + int(unpermuted(np.array([mixed - begin]), end - begin, *parts)[0])
        for low, high in ((begin, end), (0, self.lane)):
            low += (own - low) % self.rows
            count = -(-(high - low) // self.rows)
            for attempt in range(count):
                drawn = permuted(np.array([attempt]), count, *self._parts("instead", epoch, lane, own, low, high))
                other = low + int(drawn[0]) * self.rows
                if other != own and ((low >= begin and high <= end) or not begin <= other < end):
                    yield int(self._at(epoch, np.array([lane]), np.array([other]))[0])

    def shards(self, epoch: int, first: int, last: int, lanes: slice = slice(None)) -> Ints:
        """The shards that the windows of the places `first` to `last` hold; see `samples` for the places.

        Args:
            lanes: of which.
        Returns:
            Int[shards], those of the windows that are read first in front.
        """
        row, found = self._row(epoch), []
        chosen = np.arange(self.lanes)[lanes]
        place, end = first // self.lanes, last // self.lanes
        while place < end:
            places = np.full(len(chosen), place)
            _, begins, ends = self._window(chosen, places)
            found += self._between(row, chosen, begins, ends)
            place = int(ends.min())
        held = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
        held = held[self.counts[held] > 0]
        _, where = np.unique(held, return_index=True)
        return held[np.sort(where)]

    def touched(self, epoch: int, first: int, last: int) -> NDArray[np.bool_]:
        """Which shards the windows of the places `first` to `last` hold; see `samples` for the places."""
        lanes = np.arange(self.lanes)
        _, begins, _ = self._window(lanes, np.full(self.lanes, first // self.lanes))
        _, _, ends = self._window(lanes, np.full(self.lanes, last // self.lanes - 1))
        touched = np.zeros(len(self.counts), bool)
        for shards in self._between(self._row(epoch), lanes, begins, ends):
            touched[shards] = True
        return touched & (self.counts > 0)

    @property
    def share_of_one_shard(self) -> float:
        """About the share of a batch's pairs whose samples are of one shard, in (0, 1]."""
        full = max(1, int(np.count_nonzero(self.counts)))
        return max(1 / full, 1 / (self.lanes * self.window))

    def describe(self) -> str:
        return f"windows of {counted(self.window, 'shard')} in {counted(self.lanes, 'lane')}"

    def _parts(self, what: str, epoch: int, *more: object) -> tuple[object, ...]:
        return (what, self.seed, epoch, *more, *self.name)

    def _row(self, epoch: int) -> _Row:
        if epoch not in self._rows:
            shards = permuted(np.arange(len(self.counts)), len(self.counts), *self._parts("shards", epoch))
            begins = np.concatenate([[0], np.cumsum(self.counts[shards])])
            turn = key_of(*self._parts("turn", epoch)) % self.length
            kept = list(self._rows.items())[1 - _EPOCHS :]
            self._rows = dict([*kept, (epoch, _Row(shards, begins, turn))])
        return self._rows[epoch]

    def _window(self, lanes: Ints, places: Ints) -> tuple[Ints, Ints, Ints]:
        """Of places in lanes: the number of the window, and where in the lane it begins and ends."""
        phase, last = self._phase[lanes], self._last[lanes]
        number = np.minimum((places + phase) // self.size, last)
        begin = np.maximum(0, number * self.size - phase)
        return number, begin, np.where(number == last, self.lane, (number + 1) * self.size - phase)

    def _between(self, row: _Row, lanes: Ints, begins: Ints, ends: Ints) -> list[Ints]:
        """The shards from a beginning to an end in each of some lanes."""
        edges = (np.stack([begins, ends - 1]) + lanes * self.lane + row.turn) % self.length
        around = edges[0] > edges[1]  # over the end of the row
        low, high = np.searchsorted(row.begins, edges, "right") - 1
        found: list[Ints] = []
        for one, other, cut in zip(low.tolist(), high.tolist(), around.tolist(), strict=True):
            found += [row.shards[one:], row.shards[: other + 1]] if cut else [row.shards[one : other + 1]]
        return found

    def _at(self, epoch: int, lanes: Ints, places: Ints) -> Ints:
        """The samples at places of lanes."""
        if not len(places):
            return places
        row = self._row(epoch)
        number, begin, end = self._window(lanes, places)
        new = np.append(True, (np.diff(lanes) != 0) | (np.diff(number) != 0))  # where another window begins
        which, heads = np.cumsum(new) - 1, np.flatnonzero(new)
        named = zip(lanes[heads].tolist(), number[heads].tolist(), strict=True)
        keys = [key_of(*self._parts("window", epoch, lane, window)) for lane, window in named]
        mixed = begin + permuted_each(places - begin, which, (end - begin)[heads], keys)
        at = (lanes * self.lane + mixed + row.turn) % self.length
        place = np.searchsorted(row.begins, at, "right") - 1
        found: Ints = self._starts[row.shards[place]] + at - row.begins[place]
        return found


def shard_counts(source: object) -> Ints | None:
    """How many samples each shard of a source has, in the order of its samples; None where it has no shards."""
    counts = getattr(source, "shard_counts", None)
    return None if counts is None else counts()


def _reversed_bits(number: int, count: int) -> int:
    """The number with its bits in reverse, in as many as numbers below `count` have."""
    bits = (count - 1).bit_length()
    return int(format(number, f"0{bits}b")[::-1], 2) if bits else 0

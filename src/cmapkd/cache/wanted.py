"""The rows that a run reads: whole ranges of keys, whose memory does not grow with the samples, and single keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]  # view number x samples of the source + index, ascending


def _no_keys() -> Keys:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Wanted:
    """Keys, each once.

    Attributes:
        ranges: Int[ranges 2], the first key of each and the one after its last; ascending, none touches another.
        single: the others, ascending, in no range.
    """

    ranges: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    single: Keys = field(default_factory=_no_keys)

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]], keys: Sequence[int] | Keys = ()) -> Self:
        """Of ranges and keys in any order; where they overlap, a key still counts once."""
        joined: list[list[int]] = []
        for first, last in sorted(ranges):
            if first >= last:
                continue
            if joined and first <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], last)
            else:
                joined.append([first, last])
        table = np.array(joined, np.int64).reshape(-1, 2)
        single = np.unique(np.asarray(keys, np.int64))
        return cls(table, single[~_inside(table, single)])

    def __len__(self) -> int:
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum()) + len(self.single)

    @property
    def end(self) -> int:
        """The key after the last one; 0 where there are none."""
        last = int(self.ranges[-1, 1]) if len(self.ranges) else 0
        return max(last, int(self.single[-1]) + 1 if len(self.single) else 0)

    def before(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many wanted keys are smaller than each of some."""
        sizes = np.append(0, np.cumsum(self.ranges[:, 1] - self.ranges[:, 0]))
        number = np.searchsorted(self.ranges[:, 0], keys, "left")  # ranges that begin before
        counted = sizes[number]
        over = np.where(number > 0, self.ranges[np.maximum(number, 1) - 1, 1] - keys, 0) if len(self.ranges) else 0
        found: NDArray[np.int64] = counted - np.maximum(over, 0) + np.searchsorted(self.single, keys, "left")
        return found

    def listed(self) -> Keys:
        """All of them, 8 bytes each."""
        if not len(self.ranges):
            return self.single
        parts = [np.arange(first, last, dtype=np.int64) for first, last in self.ranges.tolist()]
        together = np.concatenate([*parts, self.single])
        return np.sort(together) if len(self.single) else together

    def at(self, places: NDArray[np.int64]) -> Keys:
        """The keys at these places of all of them in order."""
        ranks = self.before(self.single)
        number = np.searchsorted(ranks, places, "left")  # single keys before the place
        ends = np.cumsum(self.ranges[:, 1] - self.ranges[:, 0])
        within = places - number
        found = np.empty(len(places), np.int64)
        alone = np.append(ranks, -1)[number] == places
        found[alone] = self.single[number[alone]]
        which = np.searchsorted(ends, within[~alone], "right")
        found[~alone] = self.ranges[which, 1] - (ends[which] - within[~alone]) if len(self.ranges) else 0
        return found

    def first(self, count: int) -> Wanted:
        """The first so many of them, as single keys."""
        starts = self.ranges[:count]
        parts = [np.arange(first, min(last, first + count), dtype=np.int64) for first, last in starts.tolist()]
        return Wanted(single=np.sort(np.concatenate([*parts, self.single[:count]]))[:count])


def _inside(ranges: NDArray[np.int64], keys: Keys) -> NDArray[np.bool_]:
    """Which keys are in a range."""
    if not len(ranges):
        return np.zeros(len(keys), bool)
    number = np.searchsorted(ranges[:, 0], keys, "right") - 1
    inside: NDArray[np.bool_] = (number >= 0) & (keys < ranges[np.maximum(number, 0), 1])
    return inside

"""Reads answers back: any rows of any shard, mapped from the disk, each checked to be the one that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmapkd.cache.checks import Checks
from cmapkd.cache.config import Check
from cmapkd.cache.files import CacheError
from cmapkd.cache.folder import CacheFolder
from cmapkd.cache.identity import row_check
from cmapkd.cache.layout import RowLayout
from cmapkd.cache.rows import CHECK
from cmapkd.cache.wanted import Keys, Wanted
from cmapkd.data.types import StoredRows

MOST_MAPS = 4096
"""Shards that are mapped at a time, far below what systems allow a process; the first one goes first."""
_AT_ONCE = 2**21  # bytes of rows that are read at once where embeddings are drawn


class CacheReader:
    """The finished shards of a cache, as they are now; see `data.batches.Answers`.

    Safe to use in several processes at once: nothing is written, and only finished shards are read.
    """

    def __init__(self, cache: CacheFolder, *, check: Check = "first_use") -> None:
        """Looks at sizes and records of every shard.

        Raises:
            CacheError: something is damaged.
        """
        self.cache, self.check = cache, check
        self.needs_texts, self.row_bytes = cache.layout.needs_texts, cache.layout.row_bytes
        self.parts = cache.parts()
        self._finished = [part.finished() for part in self.parts]
        self._checks = Checks(self.parts, self._finished, check)
        self._maps: dict[tuple[int, int], NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def num_absent(self, wanted: Wanted) -> int:
        """How many rows are in no finished shard. Those of samples that could not be read count as there."""
        absent = 0
        for part, finished in zip(self.parts, self._finished, strict=True):
            asked, left = part.take(wanted, finished)
            absent += part.count(wanted, [shard for shard in asked if not finished[shard]])
            wanted = left
        return absent + len(wanted)

    def has(self, view: int, index: int) -> bool:
        location = self._find(view, index)
        if location is None:
            return False
        number, shard, row = location
        return bool(self._rows(number, shard, (row,))[CHECK][0])

    def read(
        self,
        view: int | Sequence[int],
        indices: Sequence[int],
        ids: Sequence[str],
        captions: Sequence[str],
        missing: Sequence[int],
    ) -> StoredRows:
        lacking = set(missing)
        views = [view] * len(indices) if isinstance(view, int) else [*view]
        there = [position for position in range(len(indices)) if position not in lacking]
        rows = np.zeros(len(indices), self.cache.layout.dtype)
        rows[there] = self.rows(
            [views[position] for position in there],
            [indices[position] for position in there],
            [ids[position] for position in there],
        )
        expected = np.zeros(len(indices), np.uint64)
        expected[there] = [row_check(ids[position], views[position], captions[position]) for position in there]
        wrong = np.flatnonzero(rows[CHECK] != expected)
        if len(wrong):
            position = int(wrong[0])
            number, shard, _ = self._find(views[position], indices[position]) or (0, 0, 0)
            part = self.parts[number]
            raise CacheError(
                f"{part.data(shard)} answers another sample, view or caption than view {views[position]} of "
                f"{ids[position]!r} with {captions[position]!r}: the data changed in a way that its fingerprint does "
                f"not show. Remove that file and {part.record(shard).name} next to it, and build again."
            )
        absent = torch.tensor(sorted(lacking), dtype=torch.int64)
        return StoredRows(self.cache.layout.tensors(rows), absent, torch.tensor([*indices], dtype=torch.int64))

    def rows(self, views: Sequence[int], indices: Sequence[int], ids: Sequence[str]) -> NDArray[Any]:
        """The rows of some views of samples as records of the layout, whatever text they answer.

        Args:
            ids: what the samples are called where one is missing.
        Raises:
            CacheError: a row is not there, or damaged.
        """
        rows = np.zeros(len(indices), self.cache.layout.dtype)
        by_shard: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for position, (view, index) in enumerate(zip(views, indices, strict=True)):
            location = self._find(view, index)
            if location is None:
                raise CacheError(
                    f"{self.cache.path} has no view {view} of sample {ids[position]!r}: build what is missing (cmapkd "
                    "cache build RECIPE --all)"
                )
            by_shard.setdefault(location[:2], []).append((position, location[2]))
        for (part, shard), pairs in by_shard.items():
            to, at = zip(*pairs, strict=True)
            rows[[*to]] = self._rows(part, shard, at)
        return rows

    def embeddings(self, num: int, wanted: Wanted, *, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Embeddings of `num` wanted views, each equally likely, none twice; all where there are fewer.

        What else the cache holds makes no difference: other runs may add to it at any time.

        Yields:
            A part of them, of a few MiB, in the order of the keys: float32 [part dim] of images and of texts, as
            stored, and Int[part] of where their samples stand in the source.
        Raises:
            CacheError: a row is damaged.
        """
        total = len(wanted)
        chosen = np.random.default_rng(seed).choice(total, min(num, total), replace=False, shuffle=False)
        chosen.sort()  # from one end of the disk to the other
        keys = wanted.at(chosen)
        assert isinstance(self.cache.layout, RowLayout), "a teacher of two towers alone has embeddings"
        layout = self.cache.layout.embeddings()
        at_once = max(1, _AT_ONCE // self.cache.layout.row_bytes)
        for first in range(0, len(keys), at_once):
            some = keys[first : first + at_once]
            stored = self._stored(some)
            answered = stored[CHECK] != 0  # the others have no answer
            decoded = layout.decode(
                {name: torch.from_numpy(stored[name][answered]) for name in layout.dtype.names or () if name != CHECK}
            )
            yield decoded["image"], decoded["text"], torch.from_numpy(some[answered] % self.cache.length)

    def _stored(self, keys: Keys) -> NDArray[Any]:
        """Copies of the rows of these keys; zeros where there are none."""
        stored = np.zeros(len(keys), self.cache.layout.dtype)
        left = np.ones(len(keys), bool)
        for number, (part, finished) in enumerate(zip(self.parts, self._finished, strict=True)):
            shards, rows = part.find_all(keys)
            here = left & (shards >= 0) & finished[shards]
            for shard in np.unique(shards[here]).tolist():
                of_shard = here & (shards == shard)
                stored[of_shard] = self._copied(number, shard, rows[of_shard])
            left &= ~here
        return stored

    def _copied(self, number: int, shard: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Copies of some rows of a shard, of which no more is mapped than they span, and for no longer."""
        part, first = self.parts[number], int(rows.min())
        self._checks(number, shard, rows)
        shape, offset = (int(rows.max()) + 1 - first,), first * part.row_bytes
        mapped = np.memmap(part.data(shard), self.cache.layout.dtype, mode="r", offset=offset, shape=shape)
        return np.asarray(mapped[rows - first])

    def _find(self, view: int, index: int) -> tuple[int, int, int] | None:
        """Part, shard, and row within it."""
        key = view * self.cache.length + index
        for number, part in enumerate(self.parts):
            place = part.find(key)
            if place is not None and self._finished[number][place[0]]:
                return number, *place
        return None

    def _rows(self, number: int, shard: int, rows: Sequence[int]) -> NDArray[Any]:
        """Some rows of a shard, compared with their checksums when they are first read."""
        self._checks(number, shard, rows)
        mapped = self._maps.get((number, shard))
        if mapped is None:
            opened = np.memmap(self.parts[number].data(shard), self.cache.layout.dtype, mode="r")
            mapped = self._maps[number, shard] = opened.view(np.ndarray)  # a plain array: half the cost of an access
            if len(self._maps) > MOST_MAPS:
                del self._maps[next(iter(self._maps))]
        return mapped[[*rows]]

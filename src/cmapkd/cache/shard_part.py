"""Rows by the shards of the data: what is stored of a shard serves every set that the shard is in.

A file holds one view of the samples of one data shard, in their order, or a piece of them where they are many. Its name
is the digest of what the shard holds. So a set that gains shards needs the new ones alone, and what is kept in memory
grows with the shards and not with the samples.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cmapkd.cache.files import CacheError, check_values, explained, read_json, temporary_folder, write_json
from cmapkd.cache.parts import CachePart, RowFiles
from cmapkd.cache.rows import Layout
from cmapkd.cache.wanted import Keys, Wanted
from cmapkd.config.disk import flush
from cmapkd.data.shard_contents import ShardContents

ROWS_FOLDER, ROWS_FILE = "rows", "rows.json"
ALMOST_ALL = 0.9
"""Share of a piece's samples from which it is stored whole: then any other seed finds its own."""
_FILE, _VIEW = re.compile(r"([0-9a-f]{32}-\d{5,})\.(rows|json)"), re.compile(r"v\d+")


@dataclass(frozen=True)
class ShardPart(CachePart):
    """The rows of one set of data shards. A row has the number of its key: view x samples + index.

    Attributes:
        contents: the data shards of the set.
        views: numbers of views that are looked for.
        piece_rows: the most rows of a file.
    """

    contents: ShardContents
    views: int
    piece_rows: int

    @classmethod
    def open(cls, folder: Path, layout: Layout, contents: ShardContents, *, views: int, batch_size: int) -> Self | None:
        """The rows in a cache's folder; None where none were begun.

        Raises:
            CacheError: `rows.json` is damaged or gone.
        """
        piece_rows = _piece_rows(folder / ROWS_FOLDER)
        if piece_rows is None:
            return None
        return cls(folder / ROWS_FOLDER, batch_size, layout.row_bytes, contents, views, piece_rows)

    @staticmethod
    def begin(folder: Path, layout: Layout, *, views: int, batch_size: int, shard_bytes: float) -> None:
        """Makes the folders of the rows; how many rows a file has was decided by whoever was first.

        Raises:
            CacheError: they cannot be made, or `rows.json` is damaged or gone.
        """
        rows = folder / ROWS_FOLDER
        if _piece_rows(rows) is None:
            temporary = temporary_folder(rows)
            with explained(folder):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                write_json(temporary / ROWS_FILE, {"piece_rows": rows_of_shard(layout, batch_size, shard_bytes)})
                try:
                    temporary.rename(rows)
                except OSError:
                    shutil.rmtree(temporary, ignore_errors=True)
                    if _piece_rows(rows) is None:  # else another process was faster
                        raise
                flush(folder)
        for view in range(views):
            with explained(folder):
                try:
                    (rows / f"v{view}").mkdir(exist_ok=True)
                except FileExistsError:
                    raise CacheError(f"{rows / f'v{view}'} is no folder: remove it and build again") from None

    @cached_property
    def _pieces(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each piece of a view: its data shard, its number in it, and its first row; one row more at the end."""
        counts = self.contents.counts
        pieces = -(-counts // self.piece_rows)
        shard = np.repeat(np.arange(len(counts)), pieces)
        number = np.arange(len(shard)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first = np.repeat(np.cumsum(counts) - counts, pieces) + number * self.piece_rows
        return shard, number, np.append(first, counts.sum())

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_pieces", "_groups")}

    @property
    def length(self) -> int:
        """Samples of the set."""
        return int(self._pieces[2][-1])

    @property
    def rows(self) -> int:
        return self.views * self.length

    @property
    def num_shards(self) -> int:
        return self.views * len(self._pieces[0])

    def extent(self, shard: int) -> tuple[int, int]:
        view, piece = divmod(shard, len(self._pieces[0]))
        first = view * self.length
        return first + int(self._pieces[2][piece]), first + int(self._pieces[2][piece + 1])

    def _ends(self) -> NDArray[np.int64]:
        """Where the shards begin, and the row after the last one."""
        firsts = self._pieces[2][:-1] + self.length * np.arange(self.views)[:, None]
        return np.append(firsts.reshape(-1), self.rows)

    @cached_property
    def _groups(self) -> NDArray[np.int64]:
        return np.append(0, np.cumsum(-(-np.diff(self._ends()) // self.group_rows)))

    def first_group(self, shard: int) -> int:
        return int(self._groups[shard])

    def keys(self, first: int, last: int) -> Keys:
        return np.arange(first, last, dtype=np.int64)

    def find(self, key: int) -> tuple[int, int] | None:
        view, row = divmod(key, self.length)
        if not 0 <= view < self.views:
            return None
        piece = int(np.searchsorted(self._pieces[2], row, "right")) - 1
        return view * len(self._pieces[0]) + piece, row - int(self._pieces[2][piece])

    def find_all(self, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        view, row = np.divmod(keys, self.length)
        piece = np.searchsorted(self._pieces[2], row, "right") - 1
        here = (view >= 0) & (view < self.views)
        return np.where(here, view * (len(self._pieces[2]) - 1) + piece, -1), row - self._pieces[2][piece]

    def take(self, wanted: Wanted, finished: NDArray[np.bool_]) -> tuple[list[int], Wanted]:
        """A shard of which nearly all rows are wanted is stored whole. Other wanted rows are left, unless they are in
        a shard that is here already.
        """
        ends = self._ends()
        held = np.diff(wanted.before(ends))
        whole = (held > 0) & (finished | (held >= ALMOST_ALL * np.diff(ends)))
        return np.flatnonzero(whole).tolist(), _outside(wanted, ends, whole)

    def count(self, wanted: Wanted, shards: Sequence[int]) -> int:
        held = np.diff(wanted.before(self._ends()))
        return int(held[[*shards]].sum())

    def data(self, shard: int) -> Path:
        view, piece = divmod(shard, len(self._pieces[0]))
        digest = self.contents.digests[self._pieces[0][piece]].tobytes().hex()
        return self.folder / f"v{view}" / f"{digest}-{self._pieces[1][piece]:05d}.rows"

    def folders(self) -> list[Path]:
        return [self.folder, *(self.folder / f"v{view}" for view in range(self.views))]

    def finished(self, *, repair: bool = False) -> NDArray[np.bool_]:
        digests = [digest.tobytes().hex() for digest in self.contents.digests]
        pieces = [*zip(self._pieces[0].tolist(), self._pieces[1].tolist(), strict=True)]
        expected = (np.diff(self._pieces[2]) * self.row_bytes).tolist()
        found = np.zeros((self.views, len(pieces)), bool)
        for view in range(self.views):
            sizes, recorded = _listed(self.folder / f"v{view}")
            for number, (shard, piece) in enumerate(pieces):
                name = f"{digests[shard]}-{piece:05d}"
                if name in recorded:  # a look at the file itself says why it does not count
                    good = sizes.get(name) == expected[number]
                    found[view, number] = good or self.looked_at(view * len(pieces) + number, repair=repair)
        return found.reshape(-1)


@dataclass(frozen=True)
class FoundFiles(RowFiles):
    """The finished files of rows by data shards, whichever sets they are of: to look at, not to read for a run."""

    files: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path, layout: Layout) -> Self | None:
        """None where none were begun.

        Raises:
            CacheError: `rows.json` is damaged or gone.
        """
        rows = folder / ROWS_FOLDER
        if _piece_rows(rows) is None:
            return None
        views = sorted(view for view in rows.iterdir() if _VIEW.fullmatch(view.name))
        files = [view / f"{name}.rows" for view in views for name in sorted(set().union(*_listed(view)))]
        return cls(rows, 0, layout.row_bytes, tuple(files))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        sizes = [file.stat().st_size // self.row_bytes if file.is_file() else 1 for file in self.files]
        return np.append(0, np.cumsum(sizes, dtype=np.int64))

    @property
    def rows(self) -> int:
        return int(self._ends[-1])

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def extent(self, shard: int) -> tuple[int, int]:
        return int(self._ends[shard]), int(self._ends[shard + 1])

    def data(self, shard: int) -> Path:
        return self.files[shard]


def rows_of_shard(layout: Layout, batch_size: int, shard_bytes: float) -> int:
    """The most rows of a file of about `shard_bytes`: whole batches of the teacher."""
    return max(1, round(shard_bytes / (batch_size * layout.row_bytes))) * batch_size


def _piece_rows(rows: Path) -> int | None:
    """The most rows of a file in a folder of rows; None where there is no such folder.

    Raises:
        CacheError: what says so is damaged or gone.
    """
    if not rows.exists():
        return None
    file = rows / ROWS_FILE
    if not file.exists():
        raise CacheError(f"{file} is gone, and nothing else says how its rows are cut: restore it, or remove {rows}")
    values = read_json(file)
    check_values(file, values, piece_rows=int)
    if not values["piece_rows"]:
        raise CacheError(f"{file} is of no rows: remove {rows} and build again")
    return int(values["piece_rows"])


def _listed(folder: Path) -> tuple[dict[str, int], set[str]]:
    """Of the files of a view by their names without ends: the bytes of rows, and which have records.

    Raises:
        CacheError: it is no folder.
    """
    sizes: dict[str, int] = {}
    recorded: set[str] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if (found := _FILE.fullmatch(entry.name)) is None:
                    continue
                if found[2] == "json":
                    recorded.add(found[1])
                    continue
                with suppress(FileNotFoundError):  # somebody removed it meanwhile
                    sizes[found[1]] = entry.stat().st_size
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise CacheError(f"{folder} is no folder: remove it and build again") from None
    return sizes, recorded


def _outside(wanted: Wanted, ends: NDArray[np.int64], whole: NDArray[np.bool_]) -> Wanted:
    """What is wanted of the shards between `ends` that are not `whole`, and of keys behind the last of them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], whole, [True]]).astype(np.int8)))
    gaps = [(int(ends[first]), int(ends[last])) for first, last in edges.reshape(-1, 2).tolist()]
    gaps.append((int(ends[-1]), max(wanted.end, int(ends[-1]))))
    ranges = []
    for low, high in gaps:
        number = int(np.searchsorted(wanted.ranges[:, 1], low, "right"))
        while number < len(wanted.ranges) and wanted.ranges[number, 0] < high:
            first, last = wanted.ranges[number].tolist()
            ranges.append((max(first, low), min(last, high)))
            number += 1
    if not len(wanted.single):
        return Wanted.of(ranges)
    shard = np.searchsorted(ends, wanted.single, "right") - 1
    covered = np.append(whole, False)[shard]
    return Wanted.of(ranges, wanted.single[~covered])

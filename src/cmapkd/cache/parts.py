"""Parts of a cache: rows in shards that are there or not, each with a record of what it holds."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cmapkd.cache.fidelity import check_fidelity
from cmapkd.cache.files import CacheError, check_values, digest_of, explained, read_json
from cmapkd.cache.rows import Layout
from cmapkd.cache.wanted import Keys, Wanted

GROUP_BYTES = 2**18
"""About the bytes of rows that have a checksum of their own: what reading one row of a shuffled run may cost."""
PART_FILE, KEYS_FILE = "part.json", "keys.bin"


@dataclass(frozen=True)
class RowFiles(ABC):
    """Rows in shards. A shard is a file of rows, and a record that is written when it is finished."""

    folder: Path
    batch_size: int  # rows that the teacher answers at once: part of the result, to the last bit
    row_bytes: int

    @property
    @abstractmethod
    def rows(self) -> int:
        """Of all shards, whether they are there or not."""

    @property
    @abstractmethod
    def num_shards(self) -> int: ...

    @abstractmethod
    def extent(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the one after its last."""

    @abstractmethod
    def data(self, shard: int) -> Path:
        """The file of a shard's rows."""

    def record(self, shard: int) -> Path:
        """The shard's checksum and fidelity; written last."""
        return self.data(shard).with_suffix(".json")

    @property
    def group_rows(self) -> int:
        """Rows that have a checksum of their own."""
        return max(1, GROUP_BYTES // self.row_bytes)

    def num_groups(self, shard: int) -> int:
        """Checksums of a shard."""
        first, last = self.extent(shard)
        return -(-(last - first) // self.group_rows)

    def is_finished(self, shard: int) -> bool:
        """Whether a shard was finished, and is as long as it must be.

        Raises:
            CacheError: it was finished, but is gone or of another length.
        """
        if not self.record(shard).exists():
            return False
        first, last = self.extent(shard)
        expected = (last - first) * self.row_bytes
        data = self.data(shard)
        size = data.stat().st_size if data.is_file() else None
        if size != expected:
            problem = "is missing" if size is None else f"has {size:,} bytes instead of {expected:,}"
            raise CacheError(f"{data} {problem}: remove {self.record(shard).name} next to it and build again")
        return True

    def read_record(self, shard: int) -> dict[str, Any]:
        """What was noted when the shard was finished.

        Raises:
            CacheError: it is not there, damaged, or not of this shard.
        """
        record = read_json(self.record(shard))
        check_values(self.record(shard), record, rows=int, bad=int, checksum=str, fidelity=dict)
        first, last = self.extent(shard)
        if record["rows"] != last - first or record["bad"] > record["rows"]:
            raise CacheError(f"{self.record(shard)} is of another shard: remove it and build again")
        check_fidelity(self.record(shard), record["fidelity"])
        return record

    def checksum(self, shard: int) -> str:
        """Of the shard's bytes as they are now."""
        with self.data(shard).open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@dataclass(frozen=True)
class CachePart(RowFiles):
    """Rows of a set of data, found by their keys."""

    def folders(self) -> list[Path]:
        """Those in which shards are written."""
        return [self.folder]

    @abstractmethod
    def keys(self, first: int, last: int) -> Keys:
        """Of rows `first` to `last`."""

    @abstractmethod
    def find(self, key: int) -> tuple[int, int] | None:
        """The shard of a key, and its row in the shard; None where the part has no such key."""

    @abstractmethod
    def find_all(self, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same of many keys: shards, -1 where there is none, and rows in them."""

    @abstractmethod
    def take(self, wanted: Wanted, finished: NDArray[np.bool_]) -> tuple[list[int], Wanted]:
        """The shards that are to hold wanted keys, and what is left for other parts.

        Args:
            finished: of each shard.
        """

    @abstractmethod
    def count(self, wanted: Wanted, shards: Sequence[int]) -> int:
        """How many wanted keys are in these shards."""

    @abstractmethod
    def first_group(self, shard: int) -> int:
        """Checksums of the shards before; of all where `shard` is the number of shards."""

    def finished(self, *, repair: bool = False) -> NDArray[np.bool_]:
        """Of each shard, whether it is finished.

        Args:
            repair: removes the record of a damaged one, so that it is built anew.
        Raises:
            CacheError: without `repair`: one was finished, but is gone or of another length.
        """
        return np.array([self.looked_at(shard, repair=repair) for shard in range(self.num_shards)], bool)

    def looked_at(self, shard: int, *, repair: bool) -> bool:
        """The same of one shard."""
        try:
            return self.is_finished(shard)
        except CacheError:
            if not repair:
                raise
            with explained(self.folder):
                self.record(shard).unlink(missing_ok=True)
            return False


@dataclass(frozen=True)
class KeyPart(CachePart):
    """Rows that were asked for at once: a range of keys, or a list of them in `keys.bin`."""

    num_keys: int
    shard_rows: int
    start: int | None  # first key of a range; none: the keys are listed
    of_data: str | None = None  # whose keys, in a cache that serves several sets of shards

    @classmethod
    def open(cls, folder: Path, layout: Layout, *, of_data: str | None = None) -> Self | None:
        """Reads `part.json` and checks the list of keys.

        Args:
            of_data: the only data whose part is opened; None: whichever.
        Returns:
            None for a part of other data.
        Raises:
            CacheError: either is damaged.
        """
        file = folder / PART_FILE
        values = read_json(file)
        check_values(file, values, rows=int, shard_rows=int, batch_size=int, start=int | None, data=str | None)
        if not values["rows"] or not values["shard_rows"]:
            raise CacheError(f"{file} is of no rows: remove {folder} and build again")
        part = cls(
            folder,
            values["batch_size"],
            layout.row_bytes,
            values["rows"],
            values["shard_rows"],
            values["start"],
            values.get("data"),
        )
        if of_data is not None and part.of_data != of_data:
            return None
        if part.start is None:
            try:
                listed = (folder / KEYS_FILE).read_bytes()
            except OSError as error:
                raise CacheError(f"{folder / KEYS_FILE} cannot be read: {error}") from None
            if digest_of(listed) != values.get("keys") or len(listed) != 8 * part.rows:
                raise CacheError(f"{folder / KEYS_FILE} is damaged: remove {folder} and build again")
        return part

    @cached_property
    def _listed(self) -> Keys:
        return np.memmap(self.folder / KEYS_FILE, np.int64, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_listed"}

    @property
    def rows(self) -> int:
        return self.num_keys

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def extent(self, shard: int) -> tuple[int, int]:
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def first_group(self, shard: int) -> int:
        return shard * -(-self.shard_rows // self.group_rows)

    def keys(self, first: int, last: int) -> Keys:
        if self.start is not None:
            return np.arange(self.start + first, self.start + last, dtype=np.int64)
        return np.array(self._listed[first:last])

    def locate(self, keys: Keys) -> NDArray[np.int64]:
        """The row of each key, -1 where there is none."""
        if self.start is not None:
            rows = keys - self.start
            return np.where((rows >= 0) & (rows < self.rows), rows, -1)
        rows = np.searchsorted(self._listed, keys)
        held = self._listed[np.minimum(rows, self.rows - 1)] == keys
        return np.where(held, rows, -1)

    def find(self, key: int) -> tuple[int, int] | None:
        if self.start is not None:
            row = key - self.start
            return divmod(row, self.shard_rows) if 0 <= row < self.rows else None
        row = int(np.searchsorted(self._listed, key))
        return divmod(row, self.shard_rows) if row < self.rows and int(self._listed[row]) == key else None

    def find_all(self, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows = self.locate(keys)
        return np.where(rows >= 0, rows // self.shard_rows, -1), rows % self.shard_rows

    def take(self, wanted: Wanted, finished: NDArray[np.bool_]) -> tuple[list[int], Wanted]:  # noqa: ARG002
        keys = wanted.listed()
        rows = self.locate(keys)
        shards = np.unique(rows[rows >= 0] // self.shard_rows)
        return shards.tolist(), Wanted(single=keys[rows < 0])

    def count(self, wanted: Wanted, shards: Sequence[int]) -> int:
        rows = self.locate(wanted.listed())
        return int(np.isin(rows[rows >= 0] // self.shard_rows, shards).sum())

    def data(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.rows"

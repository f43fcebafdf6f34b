"""A cache's folder: parts of rows, each for a sorted list of (view, sample), each in shards that are there or not."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cmapkd.cache.fidelity import check_fidelity
from cmapkd.cache.files import (
    CacheError,
    check_values,
    digest_of,
    explained,
    read_json,
    temporary_folder,
    write_json,
)
from cmapkd.cache.layout import RowLayout
from cmapkd.cache.rows import Layout
from cmapkd.cache.token_layout import TOKENS, TokenLayout
from cmapkd.config.disk import flush

GROUP_BYTES = 2**18
"""About the bytes of rows that have a checksum of their own: what reading one row of a shuffled run may cost."""
CACHE_FILE, PART_FILE, KEYS_FILE = "cache.json", "part.json", "keys.bin"
Keys = NDArray[np.int64]  # view number x samples of the source + index, ascending


@dataclass(frozen=True)
class CachePart:
    """Rows that were asked for at once: a range of keys, or a list of them in `keys.bin`."""

    folder: Path
    rows: int
    shard_rows: int
    batch_size: int  # rows that the teacher answers at once: part of the result, to the last bit
    row_bytes: int
    start: int | None  # first key of a range; none: the keys are listed

    @classmethod
    def open(cls, folder: Path, layout: Layout) -> Self:
        """Reads `part.json` and checks the list of keys.

        Raises:
            CacheError: either is damaged.
        """
        values = read_json(folder / PART_FILE)
        check_values(folder / PART_FILE, values, rows=int, shard_rows=int, batch_size=int, start=int | None)
        if not values["rows"] or not values["shard_rows"]:
            raise CacheError(f"{folder / PART_FILE} is of no rows: remove {folder} and build again")
        part = cls(
            folder, values["rows"], values["shard_rows"], values["batch_size"], layout.row_bytes, values["start"]
        )
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
    def num_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def group_rows(self) -> int:
        """Rows that have a checksum of their own."""
        return max(1, GROUP_BYTES // self.row_bytes)

    @property
    def groups_in_shard(self) -> int:
        """Of a shard that is not the last."""
        return -(-self.shard_rows // self.group_rows)

    def keys(self, first: int, last: int) -> Keys:
        """Of rows `first` to `last`."""
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

    def row_of(self, key: int) -> int:
        """The same for one key."""
        if self.start is not None:
            row = key - self.start
            return row if 0 <= row < self.rows else -1
        row = int(np.searchsorted(self._listed, key))
        return row if row < self.rows and int(self._listed[row]) == key else -1

    def extent(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the one after its last."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def data(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.rows"

    def record(self, shard: int) -> Path:
        """The shard's checksum and fidelity; written last."""
        return self.folder / f"shard-{shard:05d}.json"

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
            raise CacheError(
                f"{self.data(shard)} {problem}: remove {self.record(shard).name} next to it and build again"
            )
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
class CacheFolder:
    """A cache on disk: whose answers it holds, in which layout, and its parts."""

    path: Path
    identity: Mapping[str, Any]
    layout: Layout
    about: Mapping[str, Any]  # names of teacher and data, for people
    logit_scale: float | None  # none: of a teacher that writes
    logit_bias: float | None
    length: int  # samples of the source: keys are view * length + index

    @classmethod
    def create(cls, path: Path, **values: Any) -> Self:
        """Writes `cache.json`.

        Raises:
            CacheError: the folder cannot be written.
        """
        cache = cls(path, **values)
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
        plain = {key: value for key, value in vars(cache).items() if key != "path"}
        write_json(path / CACHE_FILE, {**plain, "layout": cache.layout.plain()})
        return cache

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads `cache.json`.

        Raises:
            CacheError: there is no cache, or it is damaged.
        """
        if path.exists() and not cls.exists(path):
            what = "holds no cache.json" if path.is_dir() else "is a file"
            raise CacheError(f"{path} {what}, so it is no cache: name the folder that cmapkd cache build printed")
        values = read_json(path / CACHE_FILE)
        check_values(
            path / CACHE_FILE,
            values,
            identity=dict,
            layout=dict,
            about=dict,
            logit_scale=float | None,
            logit_bias=float | None,
            length=int,
        )
        try:
            return cls(path, **{**values, "layout": _layout_of(values["layout"])})
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CacheError(
                f"{path / CACHE_FILE} was written by another version of cmapkd, or is damaged ({error}): remove the "
                "folder and build again"
            ) from None

    @staticmethod
    def exists(path: Path) -> bool:
        return (path / CACHE_FILE).exists()

    def parts(self) -> list[CachePart]:
        """In the order in which they were begun.

        Raises:
            CacheError: one is damaged.
        """
        folders = (folder for folder in sorted(self.path.glob("part-*")) if folder.is_dir())
        return [CachePart.open(folder, self.layout) for folder in folders]

    def next_part(self) -> int:
        """The number after the last part's."""
        numbers = [int(folder.name.removeprefix("part-")) for folder in self.path.glob("part-*")]
        return max(numbers, default=-1) + 1

    def add_part(self, keys: Keys, *, number: int, batch_size: int, shard_bytes: float) -> None:
        """Begins a part for `keys`, unless another process has begun one of this number, for whichever keys.

        Args:
            number: from before it was found out that no part has the keys.
        """
        per_batch = batch_size * self.layout.row_bytes
        shard_rows = max(1, round(shard_bytes / per_batch)) * batch_size
        folder = self.path / f"part-{number:05d}"
        contiguous = int(keys[-1]) - int(keys[0]) + 1 == len(keys)
        listed = keys.astype("<i8").tobytes()
        temporary = temporary_folder(folder)
        with explained(self.path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                if not contiguous:
                    (temporary / KEYS_FILE).write_bytes(listed)
                values = {"rows": len(keys), "shard_rows": shard_rows, "batch_size": batch_size}
                of_keys = {"start": int(keys[0])} if contiguous else {"start": None, "keys": digest_of(listed)}
                write_json(temporary / PART_FILE, values | of_keys)
                temporary.rename(folder)
                flush(self.path)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                if not (folder / PART_FILE).exists():  # else another process was faster
                    raise
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise


def _layout_of(values: Mapping[str, Any]) -> Layout:
    """The layout that `Layout.plain` described."""
    return TokenLayout.from_plain(values) if values["kind"] == TOKENS else RowLayout.from_plain(values)

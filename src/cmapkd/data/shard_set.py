"""The shards of a data set: how many samples each holds, and where one of them is looked up.

What is kept in memory grows with the shards, not with the samples. A table of all shards is kept beside their indexes,
under a name that follows from their paths, sizes and times. So a set whose files are as they were is opened without a
look into any index, and any change of a file makes another table.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmapkd.config import counted
from cmapkd.data.index_pool import alone, write_indexes
from cmapkd.data.reading import most_files
from cmapkd.data.records import Unusable
from cmapkd.data.shard_files import LocalFiles, RemoteFiles
from cmapkd.data.shard_index import (
    Damaged,
    ShardIndex,
    Stamp,
    cache_folder,
    can_write,
    index_file,
    remove_leftovers,
    write,
)
from cmapkd.data.stores import is_url
from cmapkd.data.tar_names import INDEX_VERSION

_TABLE = struct.Struct("<8s16sQQ")  # magic, digest, shards, bytes of JSON
_MAGIC = b"cmapkdst"
_ROW = np.dtype([("samples", "<u4"), ("captioned", "<u4"), ("digest", "V16")])
_OLD = 24 * 3600  # seconds after which a piece of an index is one that a killed process left
_MOST_REPAIRS = 3  # damaged files that are named


class ShardWarning(UserWarning):
    """Something that takes long, or was found damaged, where shards are opened."""


@dataclass(slots=True)
class Table:
    """What is known of all shards without a look into their indexes.

    Attributes:
        rows: of each shard its samples, those that may have a caption, and its digest; no samples where it is left out.
        warnings: in the order of the shards.
        repeated: groups of (shard, sample) that have one id, each in order.
        hidden: samples without image because of dots in their names; key and field of the first of them.
    """

    rows: NDArray[Any]
    warnings: list[str]
    repeated: list[list[tuple[int, int]]]
    hidden: tuple[int, str, str]

    def packed(self) -> bytes:
        values = {"warnings": self.warnings, "repeated": self.repeated, "hidden": self.hidden}
        body = json.dumps(values, separators=(",", ":")).encode("ascii")
        content = body + self.rows.tobytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        return _TABLE.pack(_MAGIC, digest, len(self.rows), len(body)) + content

    @classmethod
    def unpacked(cls, data: bytes, shards: int) -> Table:
        """Raises Damaged: it is not whole, or of another number of shards."""
        if len(data) < _TABLE.size:
            raise Damaged
        magic, digest, count, length = _TABLE.unpack_from(data)
        content = data[_TABLE.size :]
        whole = hashlib.blake2b(content, digest_size=16).digest() == digest
        if magic != _MAGIC or count != shards or not whole or len(content) != length + shards * _ROW.itemsize:
            raise Damaged
        values = json.loads(content[:length])
        repeated = [[(shard, sample) for shard, sample in group] for group in values["repeated"]]
        rows = np.frombuffer(content, dtype=_ROW, offset=length)
        return cls(rows, values["warnings"], repeated, tuple(values["hidden"]))


@dataclass
class ShardSet:
    """The shards of a source and their indexes, which are mapped into memory where they are read.

    Args:
        paths: of the tars.
        shorts: what each of them is called in ids.
        files: where their bytes come from.
    Attributes:
        table: what is known of all of them.
        stamps: of each shard its size and time when the set was opened; zeros where it is left out.
        repaired: what was found damaged in the cache and made anew.
    Raises:
        Unusable, OSError: the only shard, or one that is remote, cannot be read.
    """

    paths: Sequence[str]
    shorts: Sequence[str]
    files: LocalFiles | RemoteFiles = field(default_factory=LocalFiles)
    table: Table = field(init=False)
    stamps: NDArray[np.int64] = field(init=False)
    repaired: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._reset()
        self._unwritten: dict[int, bytes] = {}  # indexes that the cache did not take
        self._failed: dict[int, str] = {}
        self.stamps = np.array([self._stamp(shard) for shard in range(len(self.paths))], dtype=np.int64).reshape(-1, 2)
        file = self._file()
        found = None if self._failed else self._stored(file)
        if found is None:
            with alone(file.with_suffix(".lock")):  # the others wait, and then find what the first one made
                found = (None if self._failed else self._stored(file)) or self._make(file)
        self.table = found
        self.num_repaired = len(self.repaired)

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, ShardIndex] = OrderedDict()
        self._seen = bytearray(len(self.paths))  # whose digest this process has compared

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_maps", "_seen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _stamp(self, shard: int) -> Stamp:
        try:
            return self.files.stamp(self.paths[shard])
        except OSError as error:
            if len(self.paths) == 1:
                raise
            self._failed[shard] = str(error)
            return (0, 0)

    def _file(self) -> Path:
        """Where the table of just these files is kept."""
        name = hashlib.blake2b(f"{INDEX_VERSION}\0".encode(), digest_size=16)
        folder = os.getcwd()  # noqa: PTH109
        for path, short in zip(self.paths, self.shorts, strict=True):
            place = path if is_url(path) else os.path.join(folder, path)  # noqa: PTH118
            name.update(f"{place}\0{short}\0".encode("utf-8", "surrogatepass"))
        name.update(self.stamps.tobytes())
        return cache_folder() / f"{name.hexdigest()}.set"

    def _stored(self, file: Path) -> Table | None:
        try:
            return Table.unpacked(file.read_bytes(), len(self.paths))
        except OSError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            self._say_repaired(f"the table {file.name}")
            return None

    def _say_repaired(self, what: str) -> None:
        if what not in self.repaired:
            self.repaired.append(what)

    def _make(self, file: Path) -> Table:
        """Indexes what has no index yet, and joins what the indexes say of all shards."""
        missing = [
            (path, (size, changed))
            for shard, (path, (size, changed)) in enumerate(zip(self.paths, self.stamps.tolist(), strict=True))
            if shard not in self._failed and not index_file(path, (size, changed)).exists()
        ]
        if missing and self.files.remote:
            warnings.warn(
                f"{counted(len(missing), 'remote shard')} of {len(self.paths):,} have no index on this machine yet: "
                f"each is fetched once for it. Indexes are kept in {cache_folder()}",
                ShardWarning,
                stacklevel=2,
            )
        elif missing and can_write(cache_folder()):
            remove_leftovers(cache_folder(), time.time() - _OLD)
            write_indexes(missing)
        rows, told, hidden = np.zeros(len(self.paths), dtype=_ROW), list[str](), (0, "", "")
        whole, own, repeated = True, False, []
        for shard, path in enumerate(self.paths):
            try:
                index = self._find(shard)
            except (Unusable, OSError) as error:
                if len(self.paths) == 1 or self.files.remote:  # another time it could be read, and samples be others
                    raise
                whole = whole and isinstance(error, Unusable)
                told.append(f"{Path(path).name} is left out: {self._failed.get(shard, error)}")
                self.stamps[shard] = 0
                continue
            rows[shard] = (index.samples, index.captioned, index.digest)
            told += index.rare["warnings"]
            count, key, name = index.rare["hidden"]
            hidden = (hidden[0] + count, *(hidden[1:] if hidden[0] else (key, name)))
            own = own or len(index.hashes) > 0
            repeated += [[(shard, sample) for sample in group] for group in index.rare["repeated"]]
        if own or len({short.count("/") for short in self.shorts}) > 1:  # else an id belongs to one shard
            repeated = self._repeated_anywhere(rows)
        table = Table(rows, told, repeated, hidden)
        if whole:
            with suppress(OSError):
                write(file, table.packed())
        return table

    def _find(self, shard: int) -> ShardIndex:
        """The index of a shard, from the cache if it is there and whole, else made.

        Raises:
            Unusable: it is no uncompressed tar, or no longer the one that was opened. OSError: it cannot be read.
        """
        path, stamp = self.paths[shard], (int(self.stamps[shard, 0]), int(self.stamps[shard, 1]))
        if shard in self._failed:
            raise OSError(self._failed[shard])
        if shard in self._unwritten:
            return ShardIndex(self._unwritten[shard], trusted=True)
        file = index_file(path, stamp)
        try:
            index = ShardIndex.open(file, trusted=bool(self._seen[shard]))
            if index.stamp == stamp:
                self._seen[shard] = True
                return index
            self._say_repaired(f"the index of {Path(path).name}")
        except OSError:
            pass
        except (ValueError, struct.error):
            self._say_repaired(f"the index of {Path(path).name}")
        data = self.files.index(path, stamp)
        try:
            write(file, data)
            index = ShardIndex.open(file, trusted=True)
        except OSError:
            self._unwritten[shard] = data
            return ShardIndex(data, trusted=True)
        self._seen[shard] = True
        return index

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, mapped into memory.

        Raises:
            Unusable: it is gone, and the tar has changed. OSError: it is gone, and the tar cannot be read.
        """
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            found = self._maps.get(shard)
            if found is None:
                found = self._maps[shard] = self._find(shard)
                self._tell()
                if found.digest != self.table.rows["digest"][shard].tobytes():
                    del self._maps[shard]
                    raise Unusable(f"file has changed since it was opened: {Path(self.paths[shard]).name}")
                if len(self._maps) > most_files():
                    self._maps.popitem(last=False)
            self._maps.move_to_end(shard)
            return found

    def _tell(self) -> None:
        """A word on what was damaged after the set had been opened."""
        if said := said_repaired(self.repaired[self.num_repaired :]):
            self.num_repaired = len(self.repaired)
            warnings.warn(said[0], stacklevel=4)

    def indexes(self) -> Iterator[tuple[int, ShardIndex]]:
        """Every shard that is not left out, and its index."""
        for shard in np.flatnonzero(self.table.rows["samples"]).tolist():
            yield shard, self.index(shard)

    def _repeated_anywhere(self, rows: NDArray[Any]) -> list[list[tuple[int, int]]]:
        """Groups of samples that have one id, in any shards: by hash first, then by the ids themselves."""
        shards = np.flatnonzero(rows["samples"]).tolist()
        hashes = [self._find(shard).hashed(self.shorts[shard]) for shard in shards]
        if not hashes:
            return []
        ends = np.cumsum([len(part) for part in hashes])
        every = np.concatenate(hashes)
        order = np.argsort(every, kind="stable")
        ordered = every[order]
        alike = ordered[1:] == ordered[:-1]
        places = np.sort(order[np.append(alike, False) | np.append(False, alike)])
        groups: dict[str, list[tuple[int, int]]] = {}
        last, index = -1, None
        for place in places.tolist():
            number = int(np.searchsorted(ends, place, "right"))
            sample = place - (int(ends[number - 1]) if number else 0)
            if index is None or number != last:
                last, index = number, self._find(shards[number])
            identity = index.id(sample, self.shorts[shards[number]])
            groups.setdefault(identity, []).append((shards[number], sample))
        return [group for group in groups.values() if len(group) > 1]


def said_repaired(names: Sequence[str]) -> list[str]:
    """A warning on damaged files of the cache, if there were any."""
    if not names:
        return []
    more = f" and {len(names) - _MOST_REPAIRS} more" if len(names) > _MOST_REPAIRS else ""
    shown = ", ".join(names[:_MOST_REPAIRS])
    return [f"damaged in {cache_folder()} and made anew: {shown}{more}"]

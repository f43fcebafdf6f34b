"""The shards of a data set: how many samples each holds, and where one of them is looked up.

What is kept in memory grows with the shards, not with the samples. A table of all shards is kept beside their indexes,
under a name that follows from their paths, sizes and times. So a set whose files are as they were is opened without a
look into any index, and any change of a file makes another table.

Where counts lie beside remote shards, the table holds these claims, and a shard is indexed when it is first read.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmapkd.config import counted
from cmapkd.data.index_pool import alone, write_indexes
from cmapkd.data.kept_counts import KeptSet, kept_counts, key
from cmapkd.data.reading import most_files
from cmapkd.data.records import Unusable
from cmapkd.data.shard_counts import UNKNOWN, Claims, read_claims
from cmapkd.data.shard_files import LocalFiles, RemoteFiles
from cmapkd.data.shard_index import (
    ShardIndex,
    Stamp,
    cache_folder,
    can_write,
    index_file,
    remove_leftovers,
    write,
)
from cmapkd.data.shard_table import ROW, Table
from cmapkd.data.stores import is_url
from cmapkd.data.tar_names import INDEX_VERSION

_OLD = 24 * 3600  # seconds after which a piece of an index is one that a killed process left
_MOST_REPAIRS = 3  # damaged files that are named


class ShardWarning(UserWarning):
    """Something that takes long, or was found damaged, where shards are opened."""


@dataclass
class ShardSet:
    """The shards of a source and their indexes, which are mapped into memory where they are read.

    Args:
        paths: of the tars.
        shorts: what each of them is called in ids.
        files: where their bytes come from.
        counts: what tells how many samples remote shards have: `index`, each shard itself; `stats` or the name of a
            table, see `read_claims`; none: whatever lies beside them, else each shard itself.
    Attributes:
        table: what is known of all of them.
        claimed: Bool[shards], whose samples are a claim.
        stamps: of each shard its size and time when the set was opened; zeros where it is left out.
        repaired: what was found damaged in the cache and made anew.
    Raises:
        Unusable, OSError: the only shard, or one that is remote, cannot be read.
        ConfigError: a run that is resumed began with other shards.
    """

    paths: Sequence[str]
    shorts: Sequence[str]
    files: LocalFiles | RemoteFiles = field(default_factory=LocalFiles)
    counts: str | None = None
    table: Table = field(init=False)
    claimed: NDArray[np.bool_] = field(init=False)
    stamps: NDArray[np.int64] = field(init=False)
    repaired: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._reset()
        self._unwritten: dict[int, bytes] = {}  # indexes that the cache did not take
        self._failed: dict[int, str] = {}
        self.stamps = np.array([self._stamp(shard) for shard in range(len(self.paths))], dtype=np.int64).reshape(-1, 2)
        self.table = self._open_remote() if isinstance(self.files, RemoteFiles) else self._open(self._file())
        self.claimed = self.table.unindexed if self.files.remote else np.zeros(len(self.paths), dtype=np.bool_)
        self.num_repaired = len(self.repaired)

    def _open(self, file: Path) -> Table:
        """The table by indexes alone."""
        found = None if self._failed else self._stored(file)
        if found is None:
            with alone(file.with_suffix(".lock")):  # the others wait, and then find what the first one made
                found = (None if self._failed else self._stored(file)) or self._make(file)
        return found

    def _open_remote(self) -> Table:
        """The table of a run that goes on, else the one that this machine keeps, else by what lies beside the shards.

        A table that is kept is taken as it is: a count that is corrected later would make other batches.
        """
        exact, run, name = self._file(), kept_counts(), key(self.paths, self.counts)
        known = None if run is None else run.sets.get(name)
        if self.counts == "index" or (self.counts is None and known is not None and known.counts is None):
            table = self._open(exact)
        elif run is not None and known is not None and known.counts is not None:
            known.check(self.paths, self.stamps, run.file)
            table = self._make(None, Claims(known.counts))
        else:
            table = self._counted(exact, self._file(f"counts {self.counts or 'of any kind'}"))
        if run is not None:
            claims = np.where(table.unindexed, table.rows["samples"].astype(np.int64), UNKNOWN)
            run.sets[name] = KeptSet(claims, self.stamps) if table.unindexed.any() else KeptSet()
        return table

    def _counted(self, exact: Path, file: Path) -> Table:
        """The table by counts beside the shards, or by indexes where there are none, and no matter what counts.

        Raises:
            Unusable: there is no count of the kind that is asked for.
        """
        assert isinstance(self.files, RemoteFiles)
        files = (file, exact) if self.counts is None else (file,)
        if (found := self._first_stored(files)) is not None:
            return found
        with alone(exact.with_suffix(".lock")):
            if (found := self._first_stored(files)) is not None:
                return found
            stamps = [(size, tag) for size, tag in self.stamps.tolist()]
            claims = read_claims(self.files.store, self.paths, stamps, self.counts)
            if (claims.counts != UNKNOWN).any():
                return self._make(file, claims)
            if self.counts is not None:
                raise Unusable(
                    f"no counts lie beside its shards, counts={self.counts} asks for them: "
                    + ("; ".join(claims.warnings()) or "leave it out, and each shard is fetched once to be counted")
                )
            return self._make(exact, claims)

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, ShardIndex] = OrderedDict()
        self._seen = bytearray(len(self.paths))  # whose digest this process has compared
        self._prepared = bytearray(len(self.paths))  # whose index this process has looked for before it was read
        self._heard = bytearray(len(self.paths))  # whose warnings this process has passed on
        self._more_told = False  # that a shard has more samples than is claimed

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_maps", "_seen", "_prepared", "_heard", "_more_told")
        return {name: value for name, value in self.__dict__.items() if name not in own}

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

    def _file(self, kind: str = "") -> Path:
        """Where the table of just these files is kept, of any kind that there is of it."""
        name = hashlib.blake2b(f"{INDEX_VERSION}{kind}\0".encode(), digest_size=16)
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

    def _first_stored(self, files: Sequence[Path]) -> Table | None:
        return next((found for file in files if (found := self._stored(file)) is not None), None)

    def _say_repaired(self, what: str) -> None:
        if what not in self.repaired:
            self.repaired.append(what)

    def _index_missing(self, indexed: Sequence[int]) -> None:
        """Indexes in parallel what has no index yet, or says that each of these remote shards is fetched."""
        missing = [
            (path, (size, changed))
            for shard in indexed
            for path, (size, changed) in [(self.paths[shard], self.stamps[shard].tolist())]
            if shard not in self._failed and not index_file(path, (size, changed)).exists()
        ]
        if missing and self.files.remote:
            uncounted = ", and no count beside them" if len(indexed) < len(self.paths) else ""
            warnings.warn(
                f"{counted(len(missing), 'remote shard')} of {len(self.paths):,} have no index on this machine yet"
                f"{uncounted}: "
                f"each is fetched once for it. Indexes are kept in {cache_folder()}",
                ShardWarning,
                stacklevel=2,
            )
        elif missing and can_write(cache_folder()):
            remove_leftovers(cache_folder(), time.time() - _OLD)
            write_indexes(missing)

    def _make(self, file: Path | None, claims: Claims | None = None) -> Table:
        """Joins what is claimed of shards with what the indexes of all others say, which are made if need be.

        Args:
            file: where the table is kept, if it is.
        """
        rows, told, hidden = np.zeros(len(self.paths), dtype=ROW), list[str](), (0, "", "")
        if claims is not None:
            rows["samples"] = rows["captioned"] = np.maximum(claims.counts, 0)
            told += claims.warnings()
        indexed = [*range(len(self.paths))] if claims is None else np.flatnonzero(claims.counts == UNKNOWN).tolist()
        self._index_missing(indexed)
        whole, own, repeated = True, False, []
        for shard in indexed:
            path = self.paths[shard]
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
            repeated = self._repeated_anywhere([shard for shard in indexed if rows["samples"][shard]])
        table = Table(rows, told, repeated, hidden)
        if whole and file is not None:
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
        return self._build(shard, file)

    def _build(self, shard: int, file: Path) -> ShardIndex:
        """Makes an index, unless another process has made it meanwhile, which waited for the same remote shard."""
        path, stamp = self.paths[shard], (int(self.stamps[shard, 0]), int(self.stamps[shard, 1]))
        with alone(file.with_suffix(".lock")) if self.files.remote else nullcontext():
            if self.files.remote:
                with suppress(OSError, ValueError, struct.error):
                    index = ShardIndex.open(file)
                    if index.stamp == stamp:
                        return index
            data = self.files.index(path, stamp)
            try:
                write(file, data)
                index = ShardIndex.open(file, trusted=True)
            except OSError:
                self._unwritten[shard] = data
                return ShardIndex(data, trusted=True)
        self._seen[shard] = True
        return index

    def prepare(self, shards: Sequence[int]) -> bool:
        """Makes the index of the first of these shards whose copy is here and that has none, before it is read.

        Returns:
            Whether there was one. A shard is tried once: whoever reads it is told why it has none.
        """
        assert isinstance(self.files, RemoteFiles)
        for shard in shards:
            if not self.claimed[shard] or self._prepared[shard] or not self.files.has(self.paths[shard]):
                continue
            self._prepared[shard] = True
            if not index_file(self.paths[shard], self.files.stamp(self.paths[shard])).exists():
                with suppress(Unusable, OSError):
                    self._find(shard)
                return True
        return False

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
                if self.claimed[shard]:
                    self._tell_of(shard, found)
                elif found.digest != self.table.rows["digest"][shard].tobytes():
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

    def _tell_of(self, shard: int, index: ShardIndex) -> None:
        """A word on what a shard that was opened by a claim turns out to be, where its samples do not say it."""
        name, claimed = Path(self.paths[shard]).name, int(self.table.rows["samples"][shard])
        said = [] if self._heard[shard] else [f"{name}: {warning}" for warning in index.rare["warnings"]]
        self._heard[shard] = True
        if index.samples > claimed and not self._more_told:
            self._more_told = True
            said.append(
                f"{name} has {index.samples:,} samples, and the counts beside it say {claimed:,}: the rest is not "
                "read. Further shards of this kind are not told of"
            )
        for each in said:
            warnings.warn(each, ShardWarning, stacklevel=4)

    def indexes(self) -> Iterator[tuple[int, ShardIndex]]:
        """Every shard that is not left out, and its index."""
        for shard in np.flatnonzero(self.table.rows["samples"]).tolist():
            yield shard, self.index(shard)

    def _repeated_anywhere(self, shards: Sequence[int]) -> list[list[tuple[int, int]]]:
        """Groups of samples that have one id, in any of these shards: by hash first, then by the ids themselves."""
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

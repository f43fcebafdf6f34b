"""WebDataset tars as a map-style source: indexed once, then read in place by random access."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmapkd.config import ConfigError, in_bytes
from cmapkd.data.check import NO_CAPTION
from cmapkd.data.places import find_files, short_names
from cmapkd.data.reading import check_size
from cmapkd.data.records import MAX_TEXT_BYTES, Record, Unreachable, Unusable
from cmapkd.data.shard_contents import DIGEST, ShardContents
from cmapkd.data.shard_files import DISK, GIB, LocalFiles, RemoteFiles, copies_folder
from cmapkd.data.shard_index import ShardIndex
from cmapkd.data.shard_set import ShardSet, said_repaired
from cmapkd.data.stored import SampleFilter, StoredSource, unread
from cmapkd.data.stores import Store, is_url
from cmapkd.data.tar_index import read_record
from cmapkd.data.tar_names import IMAGE_EXTENSIONS, SYNTHETIC, TEXT_EXTENSIONS
from cmapkd.data.types import BadSampleError

Entry = tuple[int, int]
"""The number of a shard, and of a sample in it."""


class ShardSource(StoredSource):
    """The samples of tar shards, in the order of the shards and then of their first member.

    Where samples lie is looked up in indexes that are mapped into memory. The memory of a source and the time to open
    it grow with the number of shards, not of samples; with `part`, ids decide, so that every one of them is read.

    Args:
        pattern: a tar, a folder of tars, a glob, or braces as in `{000000..000012}`; or URLs of such.
        classes: names of the labels by number, so that labels may also be given by name.
        texts: keys of a sample's JSON that hold further pools of text.
        copies: folder where copies of remote shards are kept; none: beside the indexes.
        disk: GiB that these copies may take.
        counts: what tells the numbers of samples of remote shards; see `ShardSet`.
    Raises:
        ConfigError: nothing matches, no shard is a plain tar, there are no samples, dots in the names of all members
            keep their images from being found, or a part is asked for of samples whose ids are not known.
    """

    def __init__(
        self,
        pattern: str,
        *,
        keep: SampleFilter | None = None,
        classes: Sequence[str] | None = None,
        texts: Sequence[str] = (),
        copies: Path | None = None,
        disk: float | None = None,
        counts: str | None = None,
    ) -> None:
        keep = keep or SampleFilter()
        paths, self.files = _found(pattern, copies, disk, counts)
        self._pools = tuple(texts)
        self._labels = None if classes is None else {name: number for number, name in enumerate(classes)}
        try:
            self._set = ShardSet(paths, short_names([Path(path) for path in paths]), self.files, counts)
        except (Unusable, OSError) as error:
            raise ConfigError(f"webdataset:{pattern} cannot be read: {error}") from None
        if keep.part is not None and self.num_claimed:
            raise ConfigError(_no_part(pattern, int(self._set.stamps[:, 0].sum())))
        table = self._set.table
        warnings = [*table.warnings]
        total = int(table.rows["samples"].sum(dtype=np.int64))
        if table.hidden[0]:
            said = _dots(table.hidden, total)
            if table.hidden[0] == total:
                raise ConfigError(f"webdataset:{pattern}: {said}")
            warnings.append(said)
        super().__init__(
            f"webdataset:{pattern}",
            keep=keep,
            class_names=classes,
            warnings=[*warnings, *said_repaired(self._set.repaired)],
        )
        self._counts = table.rows["captioned" if self._leaves_out_silent else "samples"].astype(np.int64)
        self._ends = np.cumsum(self._counts)
        self._chosen = (
            None if keep.part is None else self._choose()
        )  # Int[samples], places among all that say something
        known = int(self._ends[-1]) if self._chosen is None else len(self._chosen)
        if keep.part is None:
            self.num_without_caption = total - known
        self._length = known if keep.limit is None else min(known, keep.limit)
        if not self._length:
            raise ConfigError(self._why_empty(total, part_is_empty=not self._some_of_part))
        self._repeated = self._find_repeated()

    _some_of_part = True

    def _choose(self) -> NDArray[np.int64]:
        """The part of the samples whose ids fall into it; counts those that have no caption."""
        chosen, silent, some = [], 0, False
        for shard, index in self._set.indexes():
            short = self._set.shorts[shard]
            of_part = self._of_part((index.id(sample, short) for sample in range(index.samples)), index.samples)
            some = some or bool(of_part.any())
            if self._leaves_out_silent and index.kept is not None:
                silent += int(of_part.sum() - of_part[index.kept].sum())
                of_part = of_part[index.kept]
            chosen.append(np.flatnonzero(of_part) + (int(self._ends[shard]) - int(self._counts[shard])))
        self.num_without_caption, self._some_of_part = silent, some
        return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)

    def _find_repeated(self) -> dict[Entry, str]:
        """Later samples of an id that came before, among those that are kept."""
        found = {}
        for group in self._set.table.repeated:
            places = [(place, entry) for entry in group if (place := self._place(entry)) is not None]
            for _, entry in places[1:]:
                found[entry] = _repeats(places[0][0])
        return found

    def _place(self, entry: Entry) -> int | None:
        """At which position an entry stands; None where it is left out."""
        shard, place = entry
        if (kept := self._kept(shard)) is not None:
            sample, place = place, int(np.searchsorted(kept, place))
            if place == len(kept) or int(kept[place]) != sample:
                return None
        place += int(self._ends[shard]) - int(self._counts[shard])
        if self._chosen is not None:
            before, place = place, int(np.searchsorted(self._chosen, place))
            if place == len(self._chosen) or int(self._chosen[place]) != before:
                return None
        return place if place < self._length else None

    def __len__(self) -> int:
        """Number of samples, readable or not."""
        return self._length

    @property
    def remote(self) -> bool:
        """Whether the shards lie on another machine."""
        return self.files.remote

    @property
    def room(self) -> int:
        """Bytes that copies of remote shards may take; of local ones there are none."""
        return self.files.limit if isinstance(self.files, RemoteFiles) else 0

    def shard_bytes(self) -> NDArray[np.int64]:
        """How large each shard is."""
        sizes: NDArray[np.int64] = self._set.stamps[:, 0]
        return sizes

    def hold(self, shards: Sequence[int]) -> bool:
        """Does one thing for shards that are wanted: indexes a copy that is here, or fetches one that is not.

        Returns:
            Whether there was something to do; see `ShardSet.prepare` and `RemoteFiles.hold`.
        """
        assert isinstance(self.files, RemoteFiles)
        return self._set.prepare(shards) or self.files.hold([self._set.paths[shard] for shard in shards])

    def shard_counts(self) -> NDArray[np.int64]:
        """How many samples each shard has, among those that are kept."""
        if self._chosen is None:
            ends = np.minimum(np.append(0, self._ends), self._length)
            counts: NDArray[np.int64] = np.diff(ends)
            return counts
        shards = np.searchsorted(self._ends, self._chosen[: self._length], "right")
        return np.bincount(shards, minlength=len(self._ends))

    def shard_contents(self) -> ShardContents | None:
        """What each shard holds of the samples that are kept; None where ids decide which are."""
        if self._chosen is not None:
            return None
        names, said = self._class_names or (), self._keep.templates
        kept = (type(self).__name__, str(self._leaves_out_silent), str(len(names)), *names, *said)
        repeated: dict[int, list[int]] = {}  # other sets may not have what these repeat
        for shard, sample in self._repeated:
            repeated.setdefault(shard, []).append(sample)
        digests = np.zeros(len(self._counts), DIGEST)
        for shard in np.flatnonzero(self._counts).tolist():
            digest = hashlib.blake2b(self._content(shard), digest_size=16)
            if self._set.claimed[shard]:  # whose samples are not known: another tag may be another file
                digest.update(b"tag %d;" % self._set.stamps[shard, 1])
            digest.update(repr(sorted(repeated.get(shard, ()))).encode())
            for part in (name.encode("utf-8", "surrogatepass") for name in (self._set.shorts[shard], *kept)):
                digest.update(b"%d:" % len(part) + part)
            digests[shard] = np.void(digest.digest())
        return ShardContents(digests, self._counts, _common_folder(self._set.paths)).part(0, self._length)

    def _entry(self, index: int) -> Entry:
        if not -self._length <= index < self._length:
            raise self._outside(index)
        place = index % self._length
        if self._chosen is not None:
            place = int(self._chosen[place])
        shard = int(np.searchsorted(self._ends, place, "right"))
        sample = place - int(self._ends[shard]) + int(self._counts[shard])
        if (kept := self._kept(shard)) is not None:
            sample = int(kept[sample])
        return shard, sample

    def _kept(self, shard: int) -> NDArray[Any] | None:
        """The numbers of the samples that a shard has in the order; None where these are all."""
        return self._set.index(shard).kept if self._leaves_out_silent and not self._set.claimed[shard] else None

    @property
    def num_claimed(self) -> int:
        """How many shards there are whose samples are a claim of what lies beside them."""
        return int(self._set.claimed.sum())

    def id(self, index: int) -> str:
        """The id of the sample at `index`, whether it is good or not. One that is only claimed has number for key.

        Raises:
            BadSampleError: its shard cannot be fetched, and nothing else tells its id.
        """
        shard, sample = entry = self._entry(index)
        found = self._index(entry)
        return found.id(sample, self._set.shorts[shard]) if sample < found.samples else self._nameless(entry)

    def _nameless(self, entry: Entry) -> str:
        return f"{self._set.shorts[entry[0]]}#{entry[1]}"

    def _index(self, entry: Entry) -> ShardIndex:
        """The index of a sample's shard.

        Raises:
            BadSampleError: it is a claim, and the shard cannot be fetched or is no tar.
        """
        if not self._set.claimed[entry[0]]:
            return self._set.index(entry[0])
        try:
            return self._set.index(entry[0])
        except Unusable as error:
            raise BadSampleError(self._nameless(entry), str(error), isinstance(error, Unreachable)) from None
        except OSError as error:
            raise BadSampleError(self._nameless(entry), unread(error)) from None

    def _find(self, index: int) -> tuple[Entry, str]:
        entry, sample_id = self._entry(index), self.id(index)
        found = self._index(entry)
        reason = self._why_not(entry, found) if self._set.claimed[entry[0]] else self._repeated.get(entry)
        reason = reason or found.bad(entry[1])
        if reason is not None:
            raise BadSampleError(sample_id, reason)
        return entry, sample_id

    def _why_not(self, entry: Entry, index: ShardIndex) -> str | None:
        """What is wrong with a claimed sample that an opening by indexes would have known."""
        shard, sample = entry
        if sample >= index.samples:
            claimed = int(self._counts[shard])
            return f"shard is short: it has {index.samples:,} samples, the counts beside it say {claimed:,}"
        if self._is_silent(index, sample):
            return NO_CAPTION
        group: list[int] = next((group for group in index.rare["repeated"] if sample in group), [])
        before = [other for other in group if other < sample and not self._is_silent(index, other)]
        return _repeats(int(self._ends[shard]) - int(self._counts[shard]) + before[0]) if before else None

    def _is_silent(self, index: ShardIndex, sample: int) -> bool:
        if not self._leaves_out_silent or index.kept is None:
            return False
        place = int(np.searchsorted(index.kept, sample))
        return place == len(index.kept) or int(index.kept[place]) != sample

    def _members(self, entry: Entry) -> dict[str, tuple[int, int]]:
        return self._set.index(entry[0]).members(entry[1])

    def _read(self, entry: Entry, place: tuple[int, int]) -> bytes:
        size, changed = self._set.stamps[entry[0]].tolist()
        return self.files.read(self._set.paths[entry[0]], *place, stamp=(size, changed))

    def _record(self, entry: Entry) -> Record:
        members = self._members(entry)
        pictures = int(any(name in members for name in IMAGE_EXTENSIONS))
        texts = {}
        for name in ("json", *TEXT_EXTENSIONS, "cls", SYNTHETIC):
            if name in members:
                if members[name][1] > MAX_TEXT_BYTES:
                    raise Unusable(f"{name} is too large: {members[name][1]} bytes, limit {MAX_TEXT_BYTES}")
                texts[name] = self._read(entry, members[name])
        return read_record(texts, self._labels, self._pools, pictures=pictures)[0]

    def _image(self, entry: Entry) -> bytes:
        members = self._members(entry)
        place = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
        if place is None:
            raise Unusable(f"no image: its members are {', '.join(members)}")
        check_size(place[1])
        return self._read(entry, place)

    def fingerprint(self) -> str:
        """32 hexadecimal digits over names and digests of the shards, and over which of their samples are kept.

        A digest covers a tar's size, and of its samples the ids, which of them have captions, and the fields, offsets
        and sizes of their members; not the tar's path or time. Of a shard whose samples are a claim, its size and the
        claim take the digest's place. So the same data opened by indexes have another fingerprint.
        """
        digest = hashlib.blake2b(digest_size=16)
        for part in (type(self).__name__, *(self._class_names or ()), *self._keep.templates):
            digest.update(b"%d:" % len(part.encode()) + part.encode())
        rows = self._set.table.rows
        for shard in np.flatnonzero(rows["samples"]).tolist():
            short = self._set.shorts[shard].encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(short) + short + self._content(shard))
        left_out = self._leaves_out_silent and self.num_without_caption > 0
        digest.update(b"%d of %d" % (self._length, int(rows["samples"].sum(dtype=np.int64)) if not left_out else -1))
        if self._chosen is not None:
            digest.update(np.ascontiguousarray(self._chosen[: self._length]).tobytes())
        return digest.hexdigest()

    def _content(self, shard: int) -> bytes:
        """What is known of the samples of a shard: the digest of its index, or the claim and its size."""
        rows = self._set.table.rows
        if self._set.claimed[shard]:
            return b"claimed:%d of %d;" % (rows["samples"][shard], self._set.stamps[shard, 0])
        digest: bytes = rows["digest"][shard].tobytes()
        return digest


def _found(
    pattern: str, copies: Path | None, disk: float | None, counts: str | None
) -> tuple[list[str], LocalFiles | RemoteFiles]:
    """The shards that a pattern names, and where their bytes come from."""
    if not is_url(pattern):
        if copies is not None or disk is not None or counts is not None:
            raise ConfigError(
                f"webdataset:{pattern} lies on this machine: leave out the options disk, copies and counts"
            )
        return [str(path) for path in find_files(pattern, suffix=".tar", what="webdataset:")], LocalFiles()
    store = Store(pattern)
    stamps = store.find(pattern)
    limit = DISK if disk is None else int(disk * GIB)
    return [url for url, _ in stamps], RemoteFiles(store, stamps, folder=copies or copies_folder(), limit=limit)


def _common_folder(paths: Sequence[str]) -> str:
    """The innermost folder of all shards, on this machine or in a store."""
    placed = [path if is_url(path) else os.path.abspath(path) for path in paths]  # noqa: PTH100 - of many paths
    return os.path.commonpath([os.path.dirname(path) for path in placed])  # noqa: PTH120


def _repeats(place: int) -> str:
    return f"duplicate id: the sample at position {place} has it already"


def _no_part(pattern: str, size: int) -> str:
    return (
        f"webdataset:{pattern} is opened by the counts beside its shards, which tell no ids, and part= chooses by ids: "
        "name other shards for training than for validation, such as {00000..00329}.tar and 00330.tar; or add "
        f"counts=index, and each shard is fetched once to be indexed, {in_bytes(size)} in all"
    )


def _dots(hidden: tuple[int, str, str], total: int) -> str:
    count, key, field = hidden
    stem, _, extension = field.rpartition(".")
    return (
        f"{count} of {total} samples have no image, because the key of a sample ends at the first dot of a name: "
        f"'{key}.{field}' is the field {field!r} of {key!r}. Name the files with one dot, such as "
        f"'{key}_{stem.replace('.', '_')}.{extension}'"
    )

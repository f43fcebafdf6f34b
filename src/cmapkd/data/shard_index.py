"""The index of one shard as a file: made once, then mapped into memory, so that no sample of it becomes an object.

The file is little-endian: a header, columns that start at multiples of 8 bytes, the ids as one block of UTF-8, and a
JSON object of what is rare (reasons, warnings). Columns are as narrow as their largest number allows, about 25 bytes a
sample beside its id. A digest covers everything but the tar's time, so that a copy of a tar has the same one.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cmapkd.data.tar_names import IMAGE_EXTENSIONS, INDEX_VERSION, is_image_behind_a_dot
from cmapkd.data.tar_walk import BLOCK, Members, walk

Stamp = tuple[int, int]
"""A file's size and its modification time in ns."""

_MAGIC = b"cmapkdix"
_HEADER = struct.Struct("<8sI16sQqQQQQQQ8s4x")
# magic, version, digest; the tar's size and time; samples, members, samples with a caption, ids of their own, bytes of
# ids, bytes of JSON; widths of the columns


class Damaged(ValueError):
    """A file is no index, or no longer what was written."""


def cache_folder() -> Path:
    """Where indexes are kept: under `$XDG_CACHE_HOME`, else under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path("~/.cache").expanduser()) / "cmapkd" / "index"


def index_file(path: str, stamp: Stamp) -> Path:
    """The file that holds the index of a tar, by its place, size and time."""
    place = path if "://" in path else Path(path).absolute()
    name = f"{INDEX_VERSION}\0{place}\0{stamp}".encode("utf-8", "surrogatepass")
    return cache_folder() / f"{hashlib.blake2b(name, digest_size=16).hexdigest()}.idx"


def stamp_of(path: str) -> Stamp:
    """Raises OSError."""
    status = os.stat(path)  # noqa: PTH116 - of a hundred thousand shards, without an object for each
    return status.st_size, status.st_mtime_ns


def id_hash(identity: str) -> int:
    """64 bits that tell ids apart; equal ones are compared whole."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class ShardIndex:
    """An index in its file form: samples by number, without an object for each.

    Args:
        data: bytes of a whole file, or the file mapped into memory.
        trusted: that its digest has been compared before.
    Attributes:
        stamp: of the tar.
        samples, captioned: how many there are, and how many of them have a caption or may have one.
        digest: of everything but the tar's time.
        kept: Int[captioned], the numbers of those that may have a caption; None where all may.
    Raises:
        Damaged: it is no whole index.
    """

    def __init__(self, data: bytes | mmap.mmap, *, trusted: bool = False) -> None:
        if len(data) < _HEADER.size:
            raise Damaged
        magic, version, self.digest, size, time, self.samples, members, self.captioned, named, text, rest, widths = (
            _HEADER.unpack_from(data)
        )
        if (magic, version) != (_MAGIC, INDEX_VERSION):
            raise Damaged
        self.stamp: Stamp = (size, time)
        counts = _counts(self.samples, members, self.captioned, named)
        columns: list[NDArray[Any]] = []
        at = _HEADER.size
        if sum(
            -(-count * width // 8) * 8 for count, width in zip(counts, widths, strict=True)
        ) + at + text + rest != len(data):
            raise Damaged
        for count, width in zip(counts, widths, strict=True):
            columns.append(np.frombuffer(data, dtype=f"<u{width}", count=count, offset=at) if count else _NOTHING)
            at += -(-count * width // 8) * 8
        self._data, self._text, self._rest = data, at, at + text
        if not trusted and _digest(_HEADER.unpack_from(data), memoryview(data)[_HEADER.size :]) != self.digest:
            raise Damaged
        self._first, self._field, self._block, self._size, self._ends, kept, self._named, self.hashes = columns
        self.kept = kept if self.captioned < self.samples else None
        self._all_named = named == self.samples
        self._rare: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: Path, *, trusted: bool = False) -> Self:
        """Maps a file.

        Raises:
            OSError: it cannot be read. Damaged: it is not whole.
        """
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < _HEADER.size:
                raise Damaged
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), trusted=trusted)

    @property
    def rare(self) -> dict[str, Any]:
        """What the JSON says: names of fields, bad samples, warnings, samples of one id, images behind a dot."""
        if self._rare is None:
            self._rare = json.loads(self._data[self._rest : len(self._data)])
        return self._rare

    def bad(self, sample: int) -> str | None:
        """Why a sample is known to be unusable."""
        reason = self.rare["bad"].get(str(sample))
        return None if reason is None else str(reason)

    def id(self, sample: int, short: str) -> str:
        """The id of a sample: its own, else `short`, which is what the shard is called, and its key."""
        first, last = self._ends[sample : sample + 2].tolist()
        text = self._data[self._text + first : self._text + last].decode("utf-8", "surrogatepass")
        return text if self.names_itself(sample) else f"{short}/{text}"

    def names_itself(self, sample: int) -> bool:
        """Whether the id stands in the sample's JSON."""
        return self._all_named or bool(len(self._named) and self._named[sample])

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Of each field of a sample where its bytes begin, and how many they are."""
        first, last = self._first[sample : sample + 2].tolist()
        names, places = self.rare["fields"], (self._field, self._block, self._size)
        rows = zip(*(column[first:last].tolist() for column in places), strict=True)
        return {names[field]: (block * BLOCK, size) for field, block, size in rows}

    def hashed(self, short: str) -> NDArray[np.uint64]:
        """`id_hash` of all samples."""
        if self._all_named:
            return self.hashes
        return np.fromiter((id_hash(self.id(i, short)) for i in range(self.samples)), np.uint64, self.samples)


_NOTHING = np.zeros(0, dtype=np.uint8)


def _counts(samples: int, members: int, captioned: int, named: int) -> tuple[int, ...]:
    """How many numbers each column has."""
    kept = captioned if captioned < samples else 0
    flags = samples if 0 < named < samples else 0
    return (samples + 1, members, members, members, samples + 1, kept, flags, named)


def _digest(header: tuple[Any, ...], body: bytes | memoryview) -> bytes:
    size, counts, widths = header[3], header[5:11], header[11]
    start = f"{INDEX_VERSION}\0{size}\0{counts}\0{widths.hex()}".encode()
    found = hashlib.blake2b(start, digest_size=16)
    found.update(body)
    return found.digest()


def pack(members: Members, stamp: Stamp) -> bytes:
    """The file form of an index, the same of the same members however they were found."""
    samples = len(members.keys)
    numbers, first = np.unique(members.field, return_index=True)
    used = numbers[np.argsort(first)]  # in the order in which the samples have them
    renumbered = np.zeros(len(members.fields), dtype=np.int64)
    renumbered[used] = np.arange(len(used))
    names = [members.ids.get(sample, key) for sample, key in enumerate(members.keys)]
    texts = [name.encode("utf-8", "surrogatepass") for name in names]
    silent = [sample for sample in members.silent if sample not in members.bad]  # count it as bad, not as silent
    kept = np.delete(np.arange(samples), silent) if silent else np.zeros(0, dtype=np.int64)
    flags = np.zeros(samples, dtype=np.uint8)
    flags[list(members.ids)] = 1
    hashes = np.array([id_hash(members.ids[sample]) for sample in sorted(members.ids)], dtype=np.uint64)
    columns = [
        np.searchsorted(members.sample, np.arange(samples + 1)),
        renumbered[members.field],
        members.offset // BLOCK,
        members.size,
        np.cumsum([0, *map(len, texts)]),
        kept,
        flags if 0 < len(members.ids) < samples else flags[:0],
        hashes,
    ]
    packed = [_narrow(column) for column in columns]
    body = b"".join(column.tobytes() + bytes(-column.nbytes % 8) for column in packed)
    rare = {
        "fields": [members.fields[number] for number in used],
        "bad": {str(sample): reason for sample, reason in sorted(members.bad.items())},
        "warnings": members.warnings,
        "repeated": _repeated(names, members.ids),
        "hidden": _hidden_images(members),
    }
    text, rest = b"".join(texts), json.dumps(rare, separators=(",", ":")).encode("ascii")
    header: tuple[Any, ...] = (
        _MAGIC,
        INDEX_VERSION,
        b"",
        *stamp,
        samples,
        len(members.sample),
        samples - len(silent),
        len(members.ids),
        len(text),
        len(rest),
        bytes(column.itemsize for column in packed),
    )
    whole = body + text + rest
    return _HEADER.pack(*header[:2], _digest(header, whole), *header[3:]) + whole


def _narrow(column: NDArray[Any]) -> NDArray[Any]:
    largest = int(column.max()) if len(column) else 0
    width = next(width for width in (1, 2, 4, 8) if largest < 256**width)
    return column.astype(f"<u{width}")


def _repeated(names: list[str], ids: dict[int, str]) -> list[list[int]]:
    """Numbers of samples that have one id: all names are ids, but a key is no id that stands in a JSON."""
    if len(set(names)) == len(names):
        return []
    groups: dict[tuple[bool, str], list[int]] = {}
    for sample, name in enumerate(names):
        groups.setdefault((sample in ids, name), []).append(sample)
    return [group for group in groups.values() if len(group) > 1]


def _hidden_images(members: Members) -> list[Any]:
    """How many samples have no image because of dots in their names; key and field of the first of them."""
    dotted = [number for number, name in enumerate(members.fields) if is_image_behind_a_dot(name)]
    if not dotted:
        return [0, "", ""]
    images = [number for number, name in enumerate(members.fields) if name in IMAGE_EXTENSIONS]
    shown = set(members.sample[np.isin(members.field, images)].tolist())
    found: dict[int, str] = {}
    for place in np.flatnonzero(np.isin(members.field, dotted)).tolist():
        sample = int(members.sample[place])
        if sample not in shown:
            found.setdefault(sample, members.fields[int(members.field[place])])
    first = next(iter(found), None)
    return [len(found), "", ""] if first is None else [len(found), members.keys[first], found[first]]


def build(path: str, stamp: Stamp) -> bytes:
    """The file form of the index of a tar, read from its headers and, for ids and captions, its small texts.

    Raises:
        Unusable: it is no uncompressed tar. OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        found = walk(file.fileno(), stamp[0])
        if found is not None:
            if found.unclear:
                from cmapkd.data.tar_entries import read_texts

                read_texts(found, file)
            return pack(found, stamp)
    from cmapkd.data.tar_entries import whole_way

    return pack(whole_way(Path(path), stamp), stamp)


def write(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def can_write(folder: Path) -> bool:
    """Whether a file can be made in the folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def remove_leftovers(folder: Path, older_than: float) -> None:
    """Removes pieces that killed builds left in the cache, but none that may still be written."""
    for piece in _pieces(folder):
        try:
            if piece.stat().st_mtime < older_than:
                piece.unlink()
        except OSError:
            continue


def _pieces(folder: Path) -> Iterable[Path]:
    try:
        return [*folder.glob("*.part")]
    except OSError:
        return []

"""The index of one tar: which samples it holds and where their bytes lie, found by its headers and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from cmapkd.data.conversations import checked_turns, with_turns
from cmapkd.data.reading import IMAGE_EXTENSIONS, is_safe_name
from cmapkd.data.records import (
    MAX_TEXT_BYTES,
    Record,
    Unusable,
    check_caption,
    decode_text,
    parse_id,
    parse_json,
    parse_lines,
    parse_record,
    parse_texts,
)

INDEX_VERSION = 2  # raised with any change of what an index says of the same tar

JSON_CAPTION_KEYS = ("captions", "caption")
TEXT_EXTENSIONS = ("txt", "text", "caption")
SYNTHETIC = "syn.json"  # synthetic captions in a member of their own, as DataCompDR has them

# webdataset's convention: the key is the path up to the first dot of the base name, the rest is the field
_NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]+)", re.DOTALL)


@dataclass(slots=True)
class Entry:
    """A sample of a tar. `captioned` is None where only reading it again can tell (its text is damaged)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # field to offset and size
    id: str | None = None
    captioned: bool | None = None
    bad: str | None = None


@dataclass(slots=True)
class TarIndex:
    stamp: tuple[int, int]  # the tar's size and modification time in ns
    entries: list[Entry]
    warnings: list[str]


def index_tar(path: Path) -> TarIndex:
    """The index of a tar, from the cache if the tar has not changed since; the cache may be read-only or absent.

    Raises:
        Unusable: it is no uncompressed tar.
    """
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    cached = cache_file(path, stamp)
    index = _load(cached, stamp)
    if index is None:
        index = build_index(path, stamp)
        _save(cached, index)
    return index


def cache_file(path: Path, stamp: tuple[int, int]) -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    folder = Path(root) if root else Path("~/.cache").expanduser()
    name = hashlib.blake2b(f"{INDEX_VERSION}\0{path.absolute()}\0{stamp}".encode("utf-8", "replace"), digest_size=16)
    return folder / "cmapkd" / "index" / f"{name.hexdigest()}.json"


def read_record(
    texts: dict[str, bytes],
    labels: dict[str, int] | None = None,
    pools: Sequence[str] = (),
    *,
    pictures: int = 1,
) -> tuple[Record, str | None]:
    """What the text members of a sample say, and the id that they give it.

    Captions of the json go before those of a text file (image downloaders write the same caption into both). `pools`
    are keys of the json that hold further texts. `pictures` are how many the sample has.

    Raises:
        Unusable: one of them is damaged.
    """
    record, identity = Record(), None
    if "json" in texts:
        values = parse_json(texts["json"])
        identity = parse_id(values, ("id",))
        record = parse_record(
            values, caption_keys=JSON_CAPTION_KEYS, label_keys=("label", "cls"), labels=labels, texts=pools
        )
        record = with_turns(record, values, pictures=pictures)
    captions, label = record.captions, record.label
    if captions is None:
        text = next((name for name in TEXT_EXTENSIONS if name in texts), None)
        captions = None if text is None else tuple(map(check_caption, parse_lines(decode_text(texts[text], "caption"))))
    if label is None and "cls" in texts:
        values = {"label": decode_text(texts["cls"], "label").strip()}
        label = parse_record(values, caption_keys=(), labels=labels).label
    further = record.texts
    if SYNTHETIC in texts:
        further = {**further, **parse_texts(parse_json(texts[SYNTHETIC]), pools)}
    silent = record.text_only and not captions and label is None
    record = replace(record, captions=captions, label=label, texts=further, text_only=silent)
    return checked_turns(record), identity


def build_index(path: Path, stamp: tuple[int, int]) -> TarIndex:
    """Reads every header of a tar, and the small text members for ids and whether there is a caption."""
    index = TarIndex(stamp, [], [])
    by_key: dict[str, Entry] = {}
    refused: Counter[str] = Counter()
    with path.open("rb") as file:
        truncated = False
        for member in _members(path, file, index.warnings):
            name = member.name.removeprefix("./")
            why = _refusal(member, name)
            parts = _NAME.fullmatch(name)
            if why:
                refused[why] += 1
            if why or parts is None:
                continue
            entry = by_key.get(parts[1])
            extension = parts[2].lower()
            if entry is None or extension in entry.members:  # the same member twice begins a second sample: a duplicate
                entry = by_key[parts[1]] = Entry(parts[1])
                index.entries.append(entry)
            entry.members[extension] = (member.offset_data, member.size)
            if member.offset_data + member.size > stamp[0]:
                entry.bad = f"shard is truncated: it ends within this sample's {extension}"
                truncated = True
        for entry in index.entries:
            _look_into(entry, file)
        truncated = truncated or bool(index.warnings)
        if truncated and index.entries and not index.entries[-1].bad and not index.entries[-1].captioned:
            index.entries[-1].bad = "shard is truncated: it ends within this sample"
    if refused:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(refused.items()))
        index.warnings.append(f"{path.name}: members left out: {kinds}")
    return index


class _Bounded:
    """Reads no more than there is: a long name may declare a size of gigabytes, for which a buffer would be made."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self._size - self._file.tell())))


def _members(path: Path, file: BinaryIO, warnings: list[str]) -> Any:
    """Members up to the end or the first damage, which is added to `warnings`."""
    try:
        bounded: Any = _Bounded(file, path.stat().st_size)
        archive = tarfile.open(fileobj=bounded, mode="r:")  # noqa: SIM115 - the caller owns the file
    except tarfile.TarError as error:
        start = os.pread(file.fileno(), 6, 0)
        if (
            start[:2] == b"\x1f\x8b"
            or start[:4] == b"\x28\xb5\x2f\xfd"
            or start[:3] == b"BZh"
            or start[:5] == b"\xfd7zXZ"
        ):
            raise Unusable("it is compressed, which rules out random access: unpack it to a plain .tar") from None
        raise Unusable(f"it is not a tar: {error}") from None
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, ValueError, OSError) as error:
            warnings.append(
                f"{path.name} is truncated or damaged at byte {archive.offset}: {error}; what precedes is read"
            )
            return
        if member is None:
            block = os.pread(file.fileno(), 512, archive.offset)
            if len(block) < 512:
                warnings.append(f"{path.name} has no end mark and is probably truncated; what is there is read")
            elif block.strip(b"\0"):
                warnings.append(f"{path.name} is damaged at byte {archive.offset}; what precedes is read")
            return
        yield member


def _refusal(member: tarfile.TarInfo, name: str) -> str | None:
    if member.isdir():
        return None  # a folder's name has no field: it is passed over
    if member.issym() or member.islnk():
        return "links"
    if not member.isreg() or member.issparse():
        return "devices or other special files"
    if not is_safe_name(name):
        return "names that point outside"
    return None


def _look_into(entry: Entry, file: BinaryIO) -> None:
    if entry.bad:
        return
    names = [name for name in ("json", *TEXT_EXTENSIONS, "cls") if name in entry.members]
    try:
        if any(entry.members[name][1] > MAX_TEXT_BYTES for name in names):
            return  # refused when it is read
        pictures = int(any(name in entry.members for name in IMAGE_EXTENSIONS))
        texts = {name: _read(file, *entry.members[name]) for name in names if name != "cls"}
        record, entry.id = read_record(texts, pictures=pictures)
    except Unusable:
        return
    entry.captioned = bool(record.captions)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, offset)


def _save(path: Path, index: TarIndex) -> None:
    values = {
        "version": INDEX_VERSION,
        "stamp": index.stamp,
        "warnings": index.warnings,
        "entries": [[e.key, e.id, e.captioned, e.bad, e.members] for e in index.entries],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                json.dump(values, file, separators=(",", ":"))
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError:
        return  # without a cache the next opening reads the headers again


def _load(path: Path, stamp: tuple[int, int]) -> TarIndex | None:
    """A cached index that is whole and belongs to this tar; anything else is made anew."""
    try:
        values = json.loads(path.read_text(encoding="ascii"))
        if values["version"] != INDEX_VERSION or tuple(values["stamp"]) != stamp:
            return None
        entries = []
        for key, identity, captioned, bad, members in values["entries"]:
            places = {str(name): (int(offset), int(size)) for name, (offset, size) in members.items()}
            whole = all(min(offset, size) >= 0 and offset + size <= stamp[0] for offset, size in places.values())
            types = isinstance(key, str) and isinstance(identity, str | None) and isinstance(bad, str | None)
            if not (whole or bad) or not types or captioned not in (True, False, None):
                return None
            entries.append(Entry(key, places, identity, captioned, bad))
        return TarIndex(stamp, entries, [str(warning) for warning in values["warnings"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None

"""What a tar holds, as `tarfile` reads it: its samples, where their bytes lie, and what is damaged or refused."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from cmapkd.data.conversations import checked_turns, with_turns
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
from cmapkd.data.tar_names import (
    IMAGE_EXTENSIONS,
    JSON_CAPTION_KEYS,
    SYNTHETIC,
    TEXT_EXTENSIONS,
    is_safe_name,
    key_and_field,
)


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
            if member.isdir():
                continue
            name = member.name.removeprefix("./")
            why = _refusal(member, name)
            parts = key_and_field(name)
            if why:
                refused[why] += 1
            if why or parts is None:
                continue
            key, extension = parts
            entry = by_key.get(key)
            if entry is None or extension in entry.members:  # the same member twice begins a second sample: a duplicate
                entry = by_key[key] = Entry(key)
                index.entries.append(entry)
            entry.members[extension] = (member.offset_data, member.size)
            if member.offset_data + member.size > stamp[0]:
                entry.bad = f"shard is truncated: it ends within this sample's {extension}"
                truncated = True
        for entry in index.entries:
            look_into(entry, file)
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
        self._file, self.size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self.size - self._file.tell())))


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
            block = os.pread(file.fileno(), 512, archive.offset) if archive.offset < bounded.size else b""
            if len(block) < 512:
                warnings.append(f"{path.name} has no end mark and is probably truncated; what is there is read")
            elif block.strip(b"\0"):
                warnings.append(f"{path.name} is damaged at byte {archive.offset}; what precedes is read")
            return
        if member.size < 0:  # tarfile would go back, and might do so for ever
            warnings.append(f"{path.name} is damaged at byte {member.offset}: a size below 0; what precedes is read")
            return
        yield member


def _refusal(member: tarfile.TarInfo, name: str) -> str | None:
    if member.issym() or member.islnk():
        return "links"
    if not member.isreg() or member.issparse():
        return "devices or other special files"
    if not is_safe_name(name):
        return "names that point outside"
    return None


def look_into(entry: Entry, file: BinaryIO) -> None:
    """Reads the text members of a sample for its id and whether it has a caption."""
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

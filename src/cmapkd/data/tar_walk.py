"""Indexes a regular tar from its headers alone, many times quicker than `tarfile`; what is odd is left to `tar_index`.

Nothing is guessed: a header, a name or a size that is not of the plain form ends the walk, and the whole tar is then
read by `tarfile`. So both ways say the same of every tar, and only their speed differs. This file imports neither torch
nor Pillow, because processes that index shards start with it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmapkd.data.tar_glance import EMPTY, NO_KEY, NOT_THERE, ODD, SAYS, glance, glance_at_text
from cmapkd.data.tar_names import (
    TEXT_EXTENSIONS,
    is_safe_name,
    key_and_field,
)

BLOCK = 512
_WINDOW = 8192  # bytes that one read brings: the headers and texts of a sample mostly lie side by side
_CHECKED_AT_ONCE = 512  # headers
_LARGE = 2**20  # texts and extended headers above are left to the whole way, below every limit of `records`
_MAX_FIELDS = 60  # different fields of a shard, which are bits of one number

_TEXT_FILES = [name.encode() for name in TEXT_EXTENSIONS]
_TEXTS = frozenset((b"json", b"cls", *_TEXT_FILES))
_MOST_OF_A_MEMBER = 3 * BLOCK  # an extended header, its records, and the member's own header
# A member as nearly all writers write it: perhaps a time in fractions of a second, then a name of one dot, a size, and
# no prefix of the name. The rest of its headers is checked for many at once.
_PLAIN_MEMBER = re.compile(
    rb"(?:.{124}0{8}([0-7]{3})\0.{20}x.{355}((\d\d) mtime=[0-9.]+\n)\0+(?!\0))?"
    rb"(?=([A-Za-z0-9_-]+)\.([a-z0-9]+)\0).{124}([0-7]{11})[\0 ].{20}0.{188}\0",
    re.DOTALL,
)
_EIGHTS = np.array([8**place for place in range(5, -1, -1)], dtype=np.int64)
_PLAIN_PAX = re.compile(rb"(\d+) mtime=[0-9.]+\n")
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")
_UNREAD_PAX = ("mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment")
_UNREAD_PAX_STARTS = ("SCHILY.", "LIBARCHIVE.")


@dataclass(slots=True)
class Members:
    """The samples of a tar in the order of their first member, and their members in columns.

    Attributes:
        keys: of each sample.
        ids: that samples give themselves in their JSON, by number of the sample.
        fields: names of fields, such as `jpg`.
        sample, field, offset, size: Int[members], sorted by sample: whose member it is, the number of its field, and
            where its bytes lie.
        silent: numbers of samples that have no caption.
        bad: reasons of samples known to be unusable.
        unclear: numbers of samples whose texts `tar_index` must read.
    """

    keys: list[str]
    fields: list[str]
    sample: NDArray[np.int64]
    field: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    ids: dict[int, str] = dataclasses.field(default_factory=dict)
    silent: list[int] = dataclasses.field(default_factory=list)
    bad: dict[int, str] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    unclear: list[int] = dataclasses.field(default_factory=list)


class _Irregular(Exception):
    """This tar needs the whole way."""


def walk(file: int, size: int) -> Members | None:
    """The samples of an open tar of `size` bytes; None where it is not regular to its end."""
    try:
        return _Walk(file, size).members()
    except (_Irregular, OSError, ValueError, RecursionError):
        return None


class _Walk:
    """One pass over the headers of a tar."""

    def __init__(self, file: int, size: int) -> None:
        self.file, self.size = file, size
        self.window, self.start = b"", 0
        self.keys: list[bytes] = []
        self.by_key: dict[bytes, int] = {}  # the last sample of a key
        self.last_key, self.last = b"", -1
        self.fields: dict[bytes, int] = {}
        self.json_bit = 0
        self.rows = array("q")  # sample, field, offset and size of each member
        self.has: list[int] = []  # for each sample its fields as bits
        self.json: dict[int, int] = {}  # what the JSON of a sample says, where that is no caption
        self.text: dict[int, int] = {}  # what its text file says, likewise
        self.ids: dict[int, str] = {}

    def bytes_at(self, offset: int, size: int) -> bytes:
        start = offset - self.start
        if start < 0 or start + size > len(self.window):
            self.window, self.start, start = os.pread(self.file, max(size, _WINDOW), offset), offset, 0
        found = self.window[start : start + size]
        if len(found) < size:
            raise _Irregular
        return found

    def members(self) -> Members:
        """All of them.

        Raises:
            _Irregular: the tar is not regular. ValueError: a number or a name in it is not.
        """
        at, headers, long_name = 0, [], None
        while True:
            start = at - self.start
            if not 0 <= start <= len(self.window) - _MOST_OF_A_MEMBER:
                self.window, self.start, start = os.pread(self.file, _WINDOW, at), at, 0
            plain = _PLAIN_MEMBER.match(self.window, start) if long_name is None else None
            if plain is not None:
                records_size, records, said_size, key, field_name, octal = plain.groups()
                if records is not None:
                    if not int(records_size, 8) == int(said_size) == len(records) or plain.start(4) - start != 1024:
                        raise _Irregular
                    headers.append(self.window[start : start + BLOCK])
                    start, at = start + 2 * BLOCK, at + 2 * BLOCK
                headers.append(self.window[start : start + BLOCK])
                kind, length = 0x30, int(octal, 8)
            else:
                header = self.bytes_at(at, BLOCK)
                kind = header[156]
                if kind == 0 and long_name is None and not header.strip(b"\0"):
                    break  # the end mark
                headers.append(header)
                length = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
            data, at = at + BLOCK, at + BLOCK + (length + 511 & ~511)
            if length < 0 or data + length > self.size:
                raise _Irregular
            if len(headers) >= _CHECKED_AT_ONCE:
                check_headers(headers)
                headers = []
            if plain is not None:
                self.add(key, field_name, data, length)
            elif kind in (0x78, 0x4C) and long_name is None:  # x: pax records; L: a long name, as GNU tar writes it
                long_name = self.name_of_next(kind, data, length, at)
                continue
            elif kind == 0x30 or kind == 0:
                self.add_any(long_name or _name(header), data, length)
            elif kind != 0x35 or length:  # a folder is passed over
                raise _Irregular
            long_name = None
        check_headers(headers)
        return self.columns()

    def name_of_next(self, kind: int, data: int, length: int, end: int) -> str:
        """The name that an extended header gives the next one; empty where it gives none."""
        if length > _LARGE:
            raise _Irregular
        content = self.bytes_at(data, end - data)
        if kind == 0x4C:
            return _decoded(content)
        plain = _PLAIN_PAX.fullmatch(content, 0, length)
        if plain is not None and int(plain[1]) == length and not content[length:].strip(b"\0"):
            return ""
        return _pax_name(content, length)

    def add_any(self, name: str, data: int, length: int) -> None:
        """A member whose name is not of the plainest form."""
        name = name.removeprefix("./")
        if not is_safe_name(name) or name.endswith("/"):
            raise _Irregular
        found = key_and_field(name)
        if found is not None:
            key, field_name = found
            self.add(
                key.encode("utf-8", "surrogateescape"), field_name.encode("utf-8", "surrogateescape"), data, length
            )

    def add(self, key: bytes, field_name: bytes, data: int, length: int) -> None:
        """One member: to its sample, or to a new one."""
        number = self.fields.get(field_name)
        if number is None:
            number = self.fields[field_name] = len(self.fields)
            self.json_bit = self.json_bit or (field_name == b"json") << number
            if number >= _MAX_FIELDS:
                raise _Irregular
        bit = 1 << number
        if key != self.last_key:
            self.last_key, self.last = key, self.by_key.get(key, -1)
        sample, has = self.last, self.has
        if sample < 0 or has[sample] & bit:  # the same member twice begins a second sample: a duplicate
            self.last = self.by_key[key] = sample = len(has)
            self.keys.append(key)
            has.append(bit)
        else:
            has[sample] |= bit
        self.rows.extend((sample, number, data, length))
        if field_name in _TEXTS:
            if length > _LARGE:
                raise _Irregular
            if field_name == b"json":
                said, identity = glance(self.bytes_at(data, length))
                if said != SAYS:
                    self.json[sample] = said
                if identity is not None:
                    self.ids[sample] = identity
            elif field_name != b"cls" and (not self.json_bit & has[sample] or sample in self.json):
                self.look_at_text(sample, data, length)  # else the JSON has a caption, which goes before

    def look_at_text(self, sample: int, data: int, length: int) -> None:
        texts = sum(self.has[sample] >> self.fields[name] & 1 for name in _TEXT_FILES if name in self.fields)
        said = glance_at_text(self.bytes_at(data, length)) if texts == 1 else ODD
        self.text[sample] = said

    def columns(self) -> Members:
        table = np.frombuffer(self.rows or bytes(0), dtype=np.int64).reshape(-1, 4)
        if (np.diff(table[:, 0]) < 0).any():
            table = table[np.argsort(table[:, 0], kind="stable")]
        silent, unclear = [], []
        has_json = self.json_bit
        for sample in sorted({*self.json, *self.text, *self._without_json(has_json)}):
            said = self.json.get(sample, SAYS) if self.has[sample] & has_json else NOT_THERE
            text = self.text.get(sample, NOT_THERE)
            if said == ODD or (said in (NOT_THERE, NO_KEY) and text == ODD):
                unclear.append(sample)
                self.ids.pop(sample, None)
            elif said == EMPTY or (said in (NOT_THERE, NO_KEY) and text in (NOT_THERE, EMPTY)):
                silent.append(sample)
        sample_of, field, offset, size = np.ascontiguousarray(table.T)
        keys, fields = (
            [name.decode("utf-8", "surrogateescape") for name in names] for names in (self.keys, self.fields)
        )
        return Members(keys, fields, sample_of, field, offset, size, self.ids, silent, unclear=unclear)

    def _without_json(self, has_json: int) -> Iterable[int]:
        return (sample for sample, fields in enumerate(self.has) if not fields & has_json)


def _decoded(data: bytes) -> str:
    """The text before the first NUL, as tarfile reads names."""
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _decoded(header[:100])
    return f"{_decoded(header[345:500])}/{name}" if header[345] else name


def _pax_name(content: bytes, length: int) -> str:
    """The path in pax records; empty where they have none.

    Raises:
        _Irregular: there is anything else in them that tarfile heeds, or they are not whole.
    """
    at, name = 0, ""
    while at < length:
        record = _PAX_RECORD.match(content, at, length)
        stop = at + int(record[1]) if record is not None else 0
        if record is None or not record.end() < stop <= length or content[stop - 1 : stop] != b"\n":
            raise _Irregular
        key = record[2].decode("ascii", "replace")
        value = content[record.end() : stop - 1]
        if key == "path":
            name = value.decode("utf-8", "surrogateescape")
            if not name or name.endswith("/"):
                raise _Irregular
        elif key not in _UNREAD_PAX and not key.startswith(_UNREAD_PAX_STARTS):
            raise _Irregular
        at = stop
    if content[length:].strip(b"\0") or b"hdrcharset" in content:
        raise _Irregular
    return name


def check_headers(headers: list[bytes]) -> None:
    """Refuses headers whose checksum does not hold, or that have a number tarfile might refuse.

    Raises:
        _Irregular: there is one.
    """
    if not headers:
        return
    blocks = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, BLOCK)
    numbers = np.ascontiguousarray(blocks[:, 124:156])  # size, mtime, checksum
    owners, devices = blocks[:, 100:124], blocks[:, 329:345]  # mode, uid and gid; alike in most tars
    if (owners == owners[0]).all() and (devices == devices[0]).all():
        owners, devices = owners[:1], devices[:1]
    for values, starts, may_be_wide in (
        (numbers, (0, 12, 24), (12,)),
        (owners, (0, 8, 16), (8, 16)),
        (devices, (0, 8), ()),
    ):
        if not (_are_octal(values, starts) or _are_octal(_without_wide(values, may_be_wide), starts)):
            raise _Irregular
    checksum = numbers[:, 24:]
    if (checksum[:, 6:] >= 0x30).any() or (checksum[:, :6] < 0x30).any():  # all writers give it six digits
        raise _Irregular
    expected = (checksum[:, :6].astype(np.int64) - 0x30) @ _EIGHTS
    sums = _sums(blocks) - _sums(np.ascontiguousarray(checksum)) + 8 * 0x20
    if (sums != expected).any():
        raise _Irregular


def _are_octal(values: NDArray[np.uint8], starts: tuple[int, ...]) -> bool:
    """Whether each field, which begin at `starts`, holds octal digits and then only spaces and NULs."""
    digits = (values & 0xF8) == 0x30
    behind = digits[:, 1:] > digits[:, :-1]
    behind[:, [start - 1 for start in starts if start]] = False  # the first of a field has nothing of its own before it
    return not behind.any() and bool((digits | (values == 0) | (values == 0x20)).all())


def _without_wide(values: NDArray[np.uint8], starts: tuple[int, ...]) -> NDArray[np.uint8]:
    """The fields without those in base 256: they are numbers, whatever they are."""
    values = values.copy()
    for start in starts:
        wide = (values[:, start] == 0x80) | (values[:, start] == 0xFF)
        values[wide, start : start + (12 if values.shape[1] == 32 else 8)] = 0
    return values


def _sums(rows: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The sum of the bytes of each row, of at most 512; eight bytes at a time, as four sums of 16 bits."""
    words = rows.view("<u8")
    halves = np.uint64(0x00FF00FF00FF00FF)
    lanes = ((words & halves) + ((words >> np.uint64(8)) & halves)).sum(axis=1, dtype=np.uint64)
    sums: NDArray[np.int64] = lanes.view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64)
    return sums

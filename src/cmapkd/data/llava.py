"""LLaVA's files: one JSON array of dialogues, and a folder or zip of the pictures that they name."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cmapkd.config import ConfigError
from cmapkd.data.coco import NamedImages
from cmapkd.data.folders import open_images
from cmapkd.data.places import existing_file
from cmapkd.data.records import MAX_TEXT_BYTES
from cmapkd.data.rows import Columns
from cmapkd.data.stored import SampleFilter
from cmapkd.data.tables import TableSource, hash_file

EXAMPLE = "llava:llava_instruct_150k.json,train2017"

_PART = 2**20  # bytes that are read at once
_SPACE = " \t\r\n"


def open_llava(rest: str, *, keep: SampleFilter | None = None) -> TableSource:
    """`FILE_JSON,IMAGES`; IMAGES is a folder or a zip, which names in the file cannot leave.

    Raises:
        ConfigError: a file is missing, or is not one JSON array.
    """
    name, folder = (part.strip() for part in rest.rpartition(",")[::2])
    if not name or not folder:
        raise ConfigError(f"llava:{rest} must name a file of dialogues and its images: {EXAMPLE}")
    path = existing_file(name, "llava dialogues")
    images = NamedImages(open_images(folder, "llava images"))
    rows = enumerate(_rows(path), start=1)
    return TableSource(f"llava:{rest}", rows, images, columns=Columns(), contents=hash_file(path), keep=keep)


def _rows(path: Path) -> Iterator[Mapping[str, Any] | str]:
    with path.open("rb") as file:
        for entry in array_entries(file, str(path)):
            yield entry if isinstance(entry, dict) else f"entry is malformed: {type(entry).__name__}, not an object"


def array_entries(file: BinaryIO, name: str) -> Iterator[Any]:
    """The entries of one JSON array, one after the other: no more than one entry and a part of the file is held.

    Raises:
        ConfigError: it is not UTF-8, not one array, ends early, or an entry is larger than a record may be.
    """
    text = _Window(file, name)
    if text.peek() != "[":
        lines = " Is it one object a line? Then write jsonl: and its name." if text.peek() == "{" else ""
        raise ConfigError(f"llava dialogues {name!r} do not begin with '[': one JSON array is read.{lines}")
    text.take(1)
    number = 0
    while text.peek() != "]":
        if number:
            if text.peek() != ",":
                raise ConfigError(f"llava dialogues {name!r} are not JSON: no comma after entry {number}")
            text.take(1)
        number += 1
        yield text.entry(number)
    text.take(1)
    if text.peek():
        raise ConfigError(f"llava dialogues {name!r} go on after the end of their array")


class _Window:
    """The part of a text file that is not read yet, as far as it was looked at."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder()
        self._text, self._place, self._at_end = "", 0, False

    def _more(self) -> None:
        part = self._file.read(_PART)
        self._at_end = not part
        try:
            self._text = self._text[self._place :] + self._decode(part, final=not part)
        except UnicodeDecodeError as error:
            raise ConfigError(f"llava dialogues {self._name!r} are not UTF-8: {error}") from None
        self._place = 0

    def peek(self) -> str:
        """The next character that is no space, which is then the first one; empty at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _SPACE:
                self._place += 1
            if self._place < len(self._text) or self._at_end:
                return self._text[self._place : self._place + 1]
            self._more()

    def take(self, count: int) -> None:
        self._place += count

    def entry(self, number: int) -> Any:
        """The next value, with the comma or bracket behind it still there."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._place)
                if end < len(self._text) or self._at_end:  # of a number the rest may not be read yet
                    self._place = end
                    return value
            except (ValueError, RecursionError) as error:
                if self._at_end or isinstance(error, RecursionError):
                    raise ConfigError(
                        f"llava dialogues {self._name!r} are not JSON, or end early, at entry {number}: {error}"
                    ) from None
            if len(self._text) - self._place > MAX_TEXT_BYTES:
                raise ConfigError(
                    f"llava dialogues {self._name!r}: entry {number} is no JSON, or longer than {MAX_TEXT_BYTES} "
                    "characters"
                )
            self._more()

"""Rows of a CSV or JSON-lines file that name image files; rows of the same image become one sample."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmapkd.config import ConfigError
from cmapkd.data.classes import Classes
from cmapkd.data.conversations import is_dialogue
from cmapkd.data.listed import ListedSource
from cmapkd.data.reading import Folder, Images
from cmapkd.data.records import (
    CAPTION_KEYS,
    IMAGE_KEYS,
    MAX_TEXT_BYTES,
    Record,
    Unusable,
    parse_json,
    parse_label,
)
from cmapkd.data.rows import Columns, Group, grouped
from cmapkd.data.sniff import guess_encoding, guess_separator
from cmapkd.data.stored import SampleFilter, Texts
from cmapkd.data.turns import Turn
from cmapkd.data.types import Box, QuestionAnswer

FIRST_IMAGES = 8  # looked for when a table is opened


class TableSource(ListedSource):
    """Samples from rows that name an image.

    Rows of the same image, and of the same id where there are ids, are one sample with all their captions. The id is
    the row's own, else the path of the image as it is written. A row that cannot be read makes its sample bad. A row
    with a dialogue is a sample of its own; where its id is taken, `#2`, `#3` and so on make another.

    Args:
        rows: (row number, values or the reason that there are none).
        images: where the image files are.
        contents: what the fingerprint covers; sizes of images are not part of it.
    """

    def __init__(
        self,
        name: str,
        rows: Iterable[tuple[int, Mapping[str, Any] | str]],
        images: Images,
        *,
        columns: Columns,
        contents: str,
        keep: SampleFilter | None = None,
        classes: Classes | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        self._images, self._digest = images, contents
        seen: set[str] = set()
        groups = list(grouped(rows, columns, seen).values())
        columns.check(name, seen)
        _check_images(name, [group.image for group in groups if group.image and not group.bad][:FIRST_IMAGES], images)
        words = {group.label.strip() for group in groups if isinstance(group.label, str)}
        if classes is None and any(not word.isdecimal() for word in words):
            names = sorted(words)
            classes = Classes(tuple(names), {name: number for number, name in enumerate(names)})
        self._label_numbers = None if classes is None else classes.numbers
        self._rows = Texts(_pack(group) for group in groups)
        super().__init__(
            name,
            Texts(group.id for group in groups),
            keep=keep or SampleFilter(),
            captioned=np.array([bool(group.captions) for group in groups], dtype=np.bool_),
            bad={place: group.bad for place, group in enumerate(groups) if group.bad},
            class_names=None if classes is None else classes.names,
            warnings=warnings,
        )

    def _record(self, entry: int) -> Record:
        _, captions, label, questions, boxes, texts, turns, text_only, no_turns = json.loads(self._rows[entry])
        return Record(
            None if captions is None else tuple(captions),
            None if label is None else parse_label(label, self._label_numbers),
            tuple(QuestionAnswer(question, tuple(answers), *rest) for question, answers, *rest in questions),
            tuple(Box(*box) for box in boxes),
            {pool: tuple(written) for pool, written in texts.items()},
            tuple(Turn(*turn) for turn in json.loads(turns)),
            text_only,
            no_turns,
        )

    def _image(self, entry: int) -> bytes:
        name = json.loads(self._rows[entry])[0]
        if not name:
            raise Unusable("image is not named")
        return self._images.read(name)

    def _contents(self) -> Iterable[str]:
        """The table's own bytes; of the images only their names."""
        return [self._digest]


def _check_images(name: str, names: list[str], images: Images) -> None:
    """A wrong folder is found here rather than after a run's first thousand samples."""
    if names and not any(images.has(image) for image in names):
        where = f" (names start at {str(images.path)!r})" if isinstance(images, Folder) else ""
        hint = f"check the folder of the images{where}"
        if "://" in names[0]:
            hint = "URLs are not fetched: download the images first"
        raise ConfigError(
            f"none of the first {len(names)} images that {name} names is there, such as {names[0]!r}: {hint}."
        )


def _pack(group: Group) -> str:
    questions = [[q.question, q.answers, q.kind, q.id, q.category] for q in group.questions]
    boxes = [[b.x, b.y, b.width, b.height, b.name, b.crowd, b.area] for b in group.boxes]
    dialogue = [group.turns, group.text_only, group.no_turns]
    values = [group.image, group.captions, group.label, questions, boxes, group.texts, *dialogue]
    return json.dumps(values, separators=(",", ":"))


def open_csv(
    path: Path,
    *,
    keep: SampleFilter | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    columns: Columns | None = None,
    quotes: bool = True,
    images: Path | None = None,
    classes: Classes | None = None,
) -> TableSource:
    """A table with a header line, as open_clip reads: columns `filepath` and `title`, separated by tabs, or by commas.

    Args:
        separator: one character; None: guessed from the header, see `guess_separator`.
        encoding: as Python names it; None: guessed, see `guess_encoding`.
        quotes: whether `"` encloses a field; a table whose captions begin with a lone `"` needs False.
        images: the folder that image paths start from; None: the table's own.
    Raises:
        ConfigError: no header, or no column of images.
    """
    columns = columns or Columns(("filepath", *IMAGE_KEYS), ("title", *CAPTION_KEYS))
    remarks: list[str | None] = []
    if encoding is None:
        encoding, remark = guess_encoding(path)
        remarks.append(remark)
    header = _header(path, encoding)
    if separator is None:
        separator, remark = guess_separator(header, images=columns.image, says=(*columns.caption, *columns.label))
        remarks.append(remark)
    names = _as_asked([name.strip() for name in next(_reader([header], separator, quotes), [])])
    chosen = _choose(path, names, columns)
    return TableSource(
        f"csv:{path}",
        _csv_rows(path, names, separator, quotes, encoding),
        Folder(images or path.parent, strict=False),
        columns=chosen,
        contents=hash_file(path),
        keep=keep,
        classes=classes,
        warnings=tuple(filter(None, remarks)),
    )


def _reader(lines: Iterable[str], separator: str, quotes: bool) -> Iterator[list[str]]:
    return csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE)


def _header(path: Path, encoding: str) -> str:
    try:
        with path.open(encoding=encoding, errors=_errors(encoding), newline="") as file:
            line = file.readline(MAX_TEXT_BYTES).rstrip("\r\n")
    except UnicodeError as error:
        raise ConfigError(f"csv {str(path)!r} cannot be read as {encoding}: {error}") from None
    if not line.strip():
        raise ConfigError(
            f"csv {str(path)!r} is empty: its first line must name the columns, such as filepath and title"
        )
    return line


def _errors(encoding: str) -> str:
    """Bytes that are no text spoil one row; the escapes of them exist for encodings of single bytes and UTF-8."""
    return "replace" if encoding.startswith(("utf-16", "utf-32", "utf_16", "utf_32")) else "surrogateescape"


def _choose(path: Path, names: list[str], columns: Columns) -> Columns:
    """The columns as this table has them: one each, so that an empty field is not looked up under another name."""
    present = {
        role: _found(wanted, names)
        for role, wanted in (
            ("image", columns.image),
            ("caption", columns.caption),
            ("id", columns.id),
            ("label", columns.label),
        )
    }
    columns.check(f"csv {str(path)!r}", names)
    says = (
        present["caption"]
        or present["label"]
        or {"question", "questions", "qa"} & set(names)
        or is_dialogue(dict.fromkeys(names, ""))
    )
    if not present["image"] or not says:
        missing = "column of captions (such as title)" if present["image"] else "column of images (such as filepath)"
        raise ConfigError(
            f"csv {str(path)!r} has no {missing}. It has: {', '.join(names)}. Name the columns in the source, "
            f"csv:{path}?csv_img_key=...&csv_caption_key=..., and the separator with &separator=tab, comma, semicolon "
            "or pipe; in a shell, quotes belong around such a name. docs/data.md has the names that are found."
        )
    id_columns = tuple(name for name in present["id"] if name not in present["image"])
    return Columns(present["image"], present["caption"], id_columns, present["label"], texts=columns.texts)


def _as_asked(names: list[str]) -> list[str]:
    """Names of questions and answers in small letters."""
    asked = {found: name for name in _ASKED for found in _found((name,), names)}
    return [asked.get(name, name) for name in names]


def _found(wanted: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The first wanted name that a table has, as the table writes it; capitals count only where two would be one."""
    lower = {name.lower(): name for name in reversed(names)}
    for name in wanted:
        if name in names or name.lower() in lower:
            return (name if name in names else lower[name.lower()],)
    return ()


def _csv_rows(
    path: Path, names: list[str], separator: str, quotes: bool, encoding: str
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    csv.field_size_limit(MAX_TEXT_BYTES)
    with path.open(encoding=encoding, errors=_errors(encoding), newline="") as file:
        reader = _reader(file, separator, quotes)
        next(reader, None)
        number = 0
        while True:
            number += 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, f"row is malformed: {error}"
                continue
            if not fields:
                continue
            if len(fields) != len(names):
                yield number, f"row is malformed: {len(fields)} fields where the header has {len(names)}"
                continue
            yield number, {name: value for name, value in zip(names, fields, strict=True) if value.strip()}


_ASKED = ("question", "questions", "qa", "answer", "answers")


def open_jsonl(
    path: Path,
    *,
    keep: SampleFilter | None = None,
    columns: Columns | None = None,
    images: Images | None = None,
    classes: Classes | None = None,
    name: str | None = None,
) -> TableSource:
    """One JSON object a line: an image file, and captions, an id, a label, questions or boxes.

    Raises:
        ConfigError: it is one JSON array instead.
    """
    return TableSource(
        name or f"jsonl:{path}",
        jsonl_rows(path.name, path),
        images or Folder(path.parent, strict=False),
        columns=columns or Columns(),
        contents=hash_file(path),
        keep=keep,
        classes=classes,
    )


def jsonl_rows(name: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.lstrip().startswith(b"["):
                raise ConfigError(f"{name} begins with '[': jsonl: reads one object a line, not one array")
            if not line.strip():
                continue
            try:
                yield number, parse_json(line, "row")
            except Unusable as error:
                yield number, str(error)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

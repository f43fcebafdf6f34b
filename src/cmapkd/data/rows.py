"""Rows of a table: which column is what, and the samples that rows of the same image make together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from cmapkd.config import ConfigError, closest
from cmapkd.data.conversations import checked_turns, is_dialogue, with_turns
from cmapkd.data.records import (
    CAPTION_KEYS,
    ID_KEYS,
    IMAGE_KEYS,
    LABEL_KEYS,
    Unusable,
    check_text,
    parse_id,
    parse_record,
)
from cmapkd.data.types import Box, QuestionAnswer


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column is what; of several names the first that a row has. `required` ones must be there.

    `texts` are columns of further pools of text, called as the columns are.
    """

    image: Sequence[str] = IMAGE_KEYS
    caption: Sequence[str] = CAPTION_KEYS
    id: Sequence[str] = ID_KEYS
    label: Sequence[str] = LABEL_KEYS
    required: Sequence[str] = ()
    texts: Sequence[str] = ()

    def check(self, name: str, found: Iterable[str]) -> None:
        """Refuses a table without a required column.

        Raises:
            ConfigError: with what the table has instead.
        """
        for column in self.required:
            if column not in (known := sorted(found)):
                raise ConfigError(
                    f"{name} has no column {column!r}{closest(column, known)}. It has: {', '.join(known)}."
                )


@dataclass(slots=True)
class Group:
    """What all rows of one sample say. A dialogue is kept as JSON: as objects, its turns need several times as much."""

    id: str
    image: str
    captions: list[str] | None = None
    label: Any = None
    questions: list[QuestionAnswer] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    turns: str = "[]"
    no_turns: str | None = None
    text_only: bool = False
    bad: str | None = None


def grouped(
    rows: Iterable[tuple[int, Mapping[str, Any] | str]], columns: Columns, seen: set[str]
) -> dict[object, Group]:
    """The samples of the rows, in the order of their first row; `seen` receives the names of all columns."""
    groups: dict[object, Group] = {}
    for number, values in rows:
        if isinstance(values, str):
            groups[number] = Group(f"row-{number}", "", bad=f"{values} (row {number})")
            continue
        seen.update(values)
        try:
            image = _image_name(values, columns)
            identity = parse_id(values, columns.id)
        except Unusable as error:
            groups[number] = Group(f"row-{number}", "", bad=f"{error} (row {number})")
            continue
        if is_dialogue(values):
            group = groups[number] = Group(identity or image or f"row-{number}", image)
        else:
            group = groups.setdefault((identity, image), Group(identity or image or f"row-{number}", image))
        _add(group, values, columns, number)
    _number_repeated(groups)
    return groups


def _number_repeated(groups: Mapping[object, Group]) -> None:
    """Gives rows that are samples of their own `#2`, `#3` and so on where another sample has their name."""
    taken = {group.id for key, group in groups.items() if not isinstance(key, int)}
    repeated = []
    for key, group in groups.items():
        if isinstance(key, int):
            repeated += [group] * (group.id in taken)
            taken.add(group.id)
    following: dict[str, int] = {}
    for group in repeated:
        name, number = group.id, following.get(group.id, 2)
        while f"{name}#{number}" in taken:  # the data may use such a name themselves
            number += 1
        group.id, following[name] = f"{name}#{number}", number + 1
        taken.add(group.id)


def _add(group: Group, values: Mapping[str, Any], columns: Columns, number: int) -> None:
    """Adds what a row says to its sample."""
    label = next((values[key] for key in columns.label if values.get(key) is not None), None)
    try:
        record = parse_record(values, caption_keys=columns.caption, label_keys=(), texts=columns.texts)
        record = with_turns(record, values, pictures=1 if group.image else 0)
        if label is None:
            checked_turns(record)
        if not group.image and not record.turns:
            raise Unusable(record.no_turns or "image is not named")
    except Unusable as error:
        group.bad = group.bad or f"{error} (row {number})"
        return
    if record.captions is not None:
        group.captions = [*(group.captions or ()), *record.captions]
    if label is not None and group.label not in (None, label):
        group.bad = group.bad or f"labels disagree: {group.label!r} and {label!r} (row {number})"
    if not isinstance(label, str | int | None):
        group.bad = group.bad or f"label is not a class number: {str(label)[:40]!r} (row {number})"
        label = None
    group.label = label if group.label is None else group.label
    group.questions += record.questions
    group.boxes += record.boxes
    group.text_only, group.no_turns = record.text_only and label is None, record.no_turns
    if record.turns:
        turns = [[turn.role, turn.text, turn.pictures, turn.learned] for turn in record.turns]
        group.turns = json.dumps(turns, separators=(",", ":"))
    for pool, texts in record.texts.items():
        group.texts.setdefault(pool, []).extend(texts)


def _image_name(values: Mapping[str, Any], columns: Columns) -> str:
    """The name of the image; empty where a row names none.

    Raises:
        Unusable: it is no name, or there are several.
    """
    name = next((values[key] for key in columns.image if values.get(key) is not None), None)
    if isinstance(name, list):
        if len(name) > 1:
            raise Unusable(f"row names {len(name)} pictures: one is read")
        name = name[0] if name else None
    if isinstance(name, dict):  # ms-swift and datasets write {"path": ...}
        name = name.get("path")
    if name is None:
        if is_dialogue(values):
            return ""
        raise Unusable("image is not named")
    if not isinstance(name, str) or not name.strip():
        raise Unusable("image is not named")
    name = check_text(name.strip(), "image name")
    return name if "://" in name else PurePosixPath(name).as_posix()

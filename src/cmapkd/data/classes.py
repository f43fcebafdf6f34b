"""Class names from a JSON file: a list, or a mapping from folder names (such as WordNet ids) to names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cmapkd.config import ConfigError
from cmapkd.data.places import existing_file


@dataclass(frozen=True, slots=True)
class Classes:
    """`names` by label; `numbers` are the labels by what the data calls its classes."""

    names: tuple[str, ...]
    numbers: dict[str, int]


def read_classes(name: str) -> Classes:
    """Reads a classes JSON.

    Raises:
        ConfigError: there is no such file, or it is none of the forms that `parse_classes` reads.
    """
    path = existing_file(name, "classes file")
    return parse_classes(path.read_bytes(), path.name)


def parse_classes(data: bytes, where: str) -> Classes:
    """One of `["cat", "dog"]`, `{"n01": "cat"}` (numbered in sorted order of the keys, as image folders are),
    `{"n01": {"index": 0, "name": "cat"}}` or `{"0": ["n01", "cat"]}`.

    Raises:
        ConfigError: it is none of these, or the numbers do not count from 0.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"classes file {where} is not JSON: {error}") from None
    rows = list(_rows(values))
    if not rows or None in rows:
        raise ConfigError(
            f'classes file {where} is none of ["cat", ...], {{"n01": "cat"}}, {{"n01": {{"index": 0, "name": "cat"}}}} '
            'or {"0": ["n01", "cat"]}'
        )
    names = {number: name for number, _, name in rows}
    numbers = {key: number for number, key, _ in rows}
    if sorted(names) != list(range(len(rows))) or len(numbers) != len(rows):
        raise ConfigError(
            f"classes file {where}: its {len(rows)} classes must be distinct and numbered from 0 without a gap"
        )
    return Classes(tuple(names[number] for number in range(len(rows))), numbers)


def _rows(values: Any) -> Any:
    """(number, key, name) of each class; None for one that is of no known form."""
    if isinstance(values, list):
        for number, name in enumerate(values):
            yield (number, name, name) if isinstance(name, str) else None
    elif isinstance(values, dict):
        numbered = all(key.isdecimal() for key in values)  # {"0": ..., "10": ...} counts, it is not an alphabet
        for place, key in enumerate(sorted(values, key=int if numbered else None)):
            value = values[key]
            if isinstance(value, str):
                yield (place, key, value)
            elif isinstance(value, dict) and isinstance(value.get("name"), str):
                number = value.get("index", place)
                yield (number, key, value["name"]) if type(number) is int else None
            elif (
                isinstance(value, list)
                and len(value) == 2
                and all(isinstance(v, str) for v in value)
                and key.isdecimal()
            ):
                yield (int(key), value[0], value[1])
            else:
                yield None

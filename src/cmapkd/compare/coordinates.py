"""Which rows of a table a name means: an arm, a value of an axis, `axis=value`, or a whole row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cmapkd.config import ConfigError, closest


class Placed(Protocol):
    """A row of a table, known by its label and by its value on each axis."""

    @property
    def coordinates(self) -> dict[str, str]: ...

    @property
    def label(self) -> str: ...


def find_coordinate(rows: Sequence[Placed], name: str, what: str) -> tuple[str, str]:
    """The coordinate that `name` means, as axis and value. A whole row has the axis "".

    Args:
        what: names the setting in an error.
    Raises:
        ConfigError: nothing has this name, or several things have it.
    """
    pairs = dict.fromkeys(pair for row in rows for pair in row.coordinates.items())
    matches = [pair for pair in pairs if name in (pair[1], "=".join(pair))]
    matches = matches or [("", row.label) for row in rows if row.label == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        choices = " or ".join("=".join(pair) for pair in matches)
        raise ConfigError(f"{what}: {name!r} could be {choices}: write one of them")
    known = list(dict.fromkeys([value for _, value in pairs] + [row.label for row in rows]))
    raise ConfigError(f"{what}: there is no {name!r}{closest(name, known)}; known: {', '.join(known)}")


def rows_at(rows: Sequence[Placed], coordinate: tuple[str, str]) -> list[int]:
    """Places of the rows that have this coordinate."""
    axis, value = coordinate
    return [place for place, row in enumerate(rows) if (row.coordinates[axis] if axis else row.label) == value]


def counterparts(rows: Sequence[Placed], coordinate: tuple[str, str] | None) -> tuple[int | None, ...]:
    """For each row the place of the row that differs from it in this coordinate alone."""
    if coordinate is None:
        return (None,) * len(rows)
    axis, value = coordinate
    if not axis:
        return (rows_at(rows, coordinate)[0],) * len(rows)
    places = {tuple(row.coordinates.items()): place for place, row in enumerate(rows)}
    return tuple(places[tuple((row.coordinates | {axis: value}).items())] for row in rows)

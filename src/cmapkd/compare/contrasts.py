"""Which rows the contrasts compare that a comparison's file declares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cmapkd.compare.config import ComparisonConfig
from cmapkd.compare.coordinates import Placed, counterparts, find_coordinate, rows_at
from cmapkd.compare.declared import ContrastConfig
from cmapkd.config import ConfigError


@dataclass(frozen=True, slots=True)
class PlannedContrast:
    """Two rows of a table, by their places, and the declaration that names them."""

    arm: int
    against: int
    declared: ContrastConfig


def plan_contrasts(comparison: ComparisonConfig, title: str, rows: Sequence[Placed]) -> tuple[PlannedContrast, ...]:
    """The contrasts of a table: its own, or those of the comparison. An arm stands for its row at each axis value.

    Of the comparison's contrasts, a table among several takes those whose two names it has.

    Raises:
        ConfigError: a name means no row, or several things, or a row would be tested against itself.
    """
    table = comparison.tables.get(title)
    if table is not None and table.contrasts is None:
        planned = []
        for declared in comparison.contrasts:
            try:
                planned += _pairs(rows, declared, "contrasts")
            except ConfigError:  # this table does not have these rows; `refuse_unplaced` sees to it that one has
                continue
        return tuple(planned)
    declarations = comparison.contrasts if table is None or table.contrasts is None else table.contrasts
    where = f"contrasts of table {title!r}" if title else "contrasts"
    return tuple(pair for declared in declarations for pair in _pairs(rows, declared, where))


def refuse_unplaced(
    comparison: ComparisonConfig, tables: Sequence[tuple[str, Sequence[Placed], tuple[PlannedContrast, ...]]]
) -> None:
    """Refuses a contrast of the comparison that no table has.

    Args:
        tables: title, rows and contrasts of each.
    Raises:
        ConfigError: with the reason of the first table.
    """
    for declared in comparison.contrasts:
        if tables and not any(pair.declared == declared for _, _, pairs in tables for pair in pairs):
            title, rows, _ = tables[0]
            pair = f"{declared.arm!r} against {declared.against!r}"
            _pairs(rows, declared, f"contrasts: no table can take {pair}. Table {title!r}")  # says why
            raise ConfigError(
                f"contrasts: no table takes {pair}, because each has contrasts of its own: move it into a table"
            )


def _pairs(rows: Sequence[Placed], declared: ContrastConfig, where: str) -> list[PlannedContrast]:
    arm = find_coordinate(rows, declared.arm, f"{where}, arm")
    against = counterparts(rows, find_coordinate(rows, declared.against, f"{where}, against"))
    pairs = []
    for place in rows_at(rows, arm):
        other = against[place]
        assert other is not None  # a coordinate was named
        if other != place:
            pairs.append(PlannedContrast(place, other, declared))
    if not pairs:
        pair = f"{declared.arm!r} against {declared.against!r}"
        raise ConfigError(f"{where}: {pair} compares a row with itself: name two different rows")
    return pairs

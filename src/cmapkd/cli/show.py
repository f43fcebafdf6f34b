"""Tables on any terminal: one that is too narrow for a table gets a short list for each of its rows."""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

FOLDED = 12  # characters of a long word that still say which it is


def show(console: Console, table: Table | str) -> None:
    """Prints a text; or a table, its rows as lists where its words and numbers would be cut off."""
    if isinstance(table, str):
        console.print(table, markup=False, highlight=False)
        return
    remarks, table.caption = table.caption, None  # below it, and not wrapped to the width of a narrow table
    try:
        if not table.columns or _narrowest(table) <= console.width:
            console.print(table)
        else:
            for line in _lists(table):
                console.print(line, soft_wrap=False)
    finally:
        table.caption = remarks
    if remarks:
        console.print(Text(_plain(remarks)))


def _narrowest(table: Table) -> int:
    """The width at which no word or number of a table is cut; a long path in a column that folds may be."""
    widths = []
    for column in table.columns:
        cells = [_plain(column.header), *map(_plain, column.cells)]
        pieces = cells if column.no_wrap else [word for cell in cells for word in cell.split()]
        widest = max(map(cell_len, pieces), default=0)
        widths.append(min(widest, FOLDED) if column.overflow == "fold" else widest)
    return sum(widths) + 3 * len(widths) + 1  # a line between, and a space on either side


def _lists(table: Table) -> Iterator[Text]:
    """Every row: its first cell, and below it `head: value` for each further cell that says something."""
    heads = [_plain(column.header) for column in table.columns]
    if table.title:
        yield Text(_plain(table.title), "italic")
    for cells in zip(*(map(_plain, column.cells) for column in table.columns), strict=True):
        if cells[0]:
            yield Text(cells[0], "bold")
        for head, cell in zip(heads[1:], cells[1:], strict=True):
            if cell and cell != "-":
                cell = cell.replace("\n", "\n    ")
                yield Text(f"  {head}: {cell}" if head else f"  {cell}")


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)

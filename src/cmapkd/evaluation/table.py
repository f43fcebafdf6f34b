"""The scores of several models as one readable table: a section for each task, a column for each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from cmapkd.config import printable
from cmapkd.evaluation.tasks import TASKS


def score_table(scores: Mapping[str, Mapping[str, Any]], *, title: str) -> Table:
    """Every task's numbers, models side by side; `-` where one does not exist.

    Args:
        scores: of `evaluate_models`.
    """
    table = Table(title=Text(printable(title)))
    table.add_column("task", no_wrap=True)
    table.add_column("measure", overflow="fold")
    for model in scores:
        table.add_column(Text(printable(model)), justify="right", overflow="fold")
    for name in (name for name in TASKS if any(name in of_model for of_model in scores.values())):
        first = True
        for column in TASKS[name].columns:
            numbers = [_dig(of_model.get(name), column.path) for of_model in scores.values()]
            if any(number is not None for number in numbers):
                cells = ["-" if number is None else f"{number:.{column.digits}f}" for number in numbers]
                table.add_row(name if first else "", column.head, *cells)
                first = False
        if not first:
            table.add_section()
    table.add_row("", "parameters", *map(shown_parameters, scores.values()))
    return table


def shown_parameters(scores: Mapping[str, Any]) -> str:
    """How many parameters; where some are another model's text tower, those first that are not."""
    borrowed = scores.get("params_borrowed", 0)
    return f"{scores['params'] - borrowed:,}" + (f" + {borrowed:,}" if borrowed else "")


def _dig(values: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, int | float) else None

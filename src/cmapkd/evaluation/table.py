"""The scores of several models as readable tables, one for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from cmapkd.evaluation.tasks import TASKS


def tables(scores: Mapping[str, Mapping[str, Any]], *, where: str) -> Iterator[Table]:
    """A table for each task that was measured: a row for each model, `-` where a number does not exist.

    Args:
        scores: of `evaluate_models`.
        where: name of the source, for the titles.
    """
    for name, task in TASKS.items():
        if not any(name in of_model for of_model in scores.values()):
            continue
        shown = [
            column
            for column in task.columns
            if any(_dig(of_model.get(name), column.path) is not None for of_model in scores.values())
        ]
        table = Table(title=f"{name}: {task.title}" + (f" ({where})" if task.needs_source else ""))
        table.add_column("model", overflow="fold")
        for column in shown:
            table.add_column(column.head, justify="right", no_wrap=True)
        for model, of_model in scores.items():
            numbers = [_dig(of_model.get(name), column.path) for column in shown]
            cells = [
                "-" if n is None else f"{n:.{column.digits}f}" for n, column in zip(numbers, shown, strict=True)
            ]
            table.add_row(model, *cells)
        yield table


def _dig(values: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, int | float) else None

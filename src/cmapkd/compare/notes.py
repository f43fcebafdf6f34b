"""What stands below a table: what its numbers are, and every run that is not in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cmapkd.compare.plan import Plan, PlannedTable
from cmapkd.compare.tables import RowSummary
from cmapkd.evaluation.headline import remark_on_retrieval, retrieval_set
from cmapkd.run import RunConfig

Finished = list[dict[int, dict[str, Any]]]  # of each row: seed -> content of metrics.json


def table_notes(plan: Plan, table: PlannedTable, rows: list[RowSummary], done: Finished) -> Iterator[str]:
    """What the numbers are, and every run that is not in them."""
    num_seeds = len(plan.comparison.seeds)
    if num_seeds == 1:
        yield "One seed: no deviation and no interval; a difference may be chance."
    else:
        yield f"Mean ± sample standard deviation over {num_seeds} seeds."
        if table.reference_name is not None:
            yield (
                f"Differences to {table.reference_name} are paired by seed, with the 95 % t interval of their mean "
                "and the number of seeds won; one comparison at a time: of twenty such intervals about one misses."
            )
            if any(cell.two_way for row in rows for cell in row.cells.values()):
                yield (
                    "The interval over pictures also covers another draw of test pictures, by a bootstrap over seeds "
                    "and pictures (Owen 2007)."
                )
    if any(cell.gap for row in rows for cell in row.cells.values()):
        yield f"Gap closed: share of the way from {table.gap_name} to the teacher, for each seed, then the mean."
    yield from table.remarks()
    if table.reference_name is None:
        yield "No differences: there is no one arm of method contrastive, and no reference was named."
    for row, finished, reference in zip(rows, done, table.reference, strict=True):
        assert row.row is not None
        for seed, error in row.errors.items():
            yield f"{row.label}, seed {seed} failed: {error}"
        missing = [seed for seed in row.row.runs if seed not in row.errors and seed not in finished]
        if missing:
            yield f"{row.label}: not finished with seed{'s'[: len(missing) > 1]} {_listed(missing)}."
        if reference is None or row.is_reference:
            continue
        other = rows[reference]
        out = sorted({seed for cell in row.cells.values() if cell.difference for seed in cell.difference.left_out})
        if out:
            yield (
                f"{row.label}: seed{'s'[: len(out) > 1]} {_listed(out)} left out of the difference, which needs both "
                f"this row and {other.label}."
            )
        differing = _different_start(row.row.config, other.row.config) if other.row is not None else []
        if differing:
            yield (
                f"{row.label} and {other.label} differ in {', '.join(differing)}: equal seeds do not give them the "
                "same initialisation and batches."
            )


def retrieval_notes(chosen: tuple[str, ...], done: Finished) -> Iterator[str]:
    """What every retrieval score of the table is of; several lines where rows differ."""
    for before in dict.fromkeys(path.partition("retrieval.")[0] for path in chosen if "retrieval." in path):
        students = [run["student"] for runs in done for run in runs.values()]
        of = [student.get(before.rstrip("."), {}) if before else student for student in students]
        where = f" of {before.rstrip('.')}" if before else ""
        sizes = dict.fromkeys(filter(None, map(retrieval_set, of)))
        if sizes:
            yield f"Retrieval{where} is over {' in some runs, and over '.join(sizes)}{' in others' * (len(sizes) > 1)}."
        yield from (
            f"{remark[0].upper()}{remark[1:]}." for remark in dict.fromkeys(filter(None, map(remark_on_retrieval, of)))
        )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _different_start(one: RunConfig, other: RunConfig) -> list[str]:
    """What makes two runs of one seed begin with other weights or see other batches."""
    parts = {
        "student": (one.student, other.student),
        "training data": tuple((run.data.train, run.data.views, run.data.more) for run in (one, other)),
        "batch size": (one.training.batch_size, other.training.batch_size),
    }
    return [name for name, (first, second) in parts.items() if first != second]

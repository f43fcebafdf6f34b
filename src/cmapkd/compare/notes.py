"""What stands below a table: what its numbers are, and every run that is not in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cmapkd.compare.metric import lower_is_better, metric_label
from cmapkd.compare.pictures import FOLDS
from cmapkd.compare.plan import Plan, PlannedTable
from cmapkd.compare.tables import RowSummary
from cmapkd.config import counted
from cmapkd.evaluation.headline import remark_on_retrieval, retrieval_set
from cmapkd.run import RunConfig

Finished = list[dict[int, dict[str, Any]]]  # of each row: seed -> content of metrics.json


def table_notes(
    plan: Plan,
    table: PlannedTable,
    rows: Sequence[RowSummary],
    done: Finished,
    metrics: tuple[str, ...],
    plateau: float | None,
) -> Iterator[str]:
    """What the numbers are, and every run that is not in them."""
    num_seeds = len(plan.comparison.seeds)
    if num_seeds == 1:
        yield "One seed: no deviation and no interval; a difference may be chance."
    else:
        yield f"Mean ± sample standard deviation over {counted(num_seeds, 'seed')}."
        yield from _difference_notes(table, rows)
    yield from _interval_notes(rows)
    yield from _plateau_notes(rows, metrics, plateau)
    yield from _gap_notes(table, rows, metrics)
    yield from table.remarks()
    if table.reference_name is None:
        yield "No differences: there is no one arm that trains without a teacher, and no reference was named."
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
        differing = _different_start(row.row.start, other.row.start) if other.row is not None else []
        if differing:
            yield (
                f"{row.label} and {other.label} differ in {', '.join(differing)}: equal seeds do not give them the "
                "same initialisation and batches."
            )


def _difference_notes(table: PlannedTable, rows: Sequence[RowSummary]) -> Iterator[str]:
    if table.reference_name is None:
        return
    yield (
        f"Differences to {table.reference_name} are paired by seed, with the 95 % t interval of their mean "
        "and the number of seeds won; one comparison at a time: of twenty such intervals about one misses."
    )
    covered = {cell.two_way.covers for row in rows for cell in row.cells.values() if cell.two_way}
    if FOLDS in covered:
        yield (
            "The second interval is over the folds' means. Each fold has test pictures and training pictures of its "
            "own, so it covers their chance too. It is wider than their t interval, because folds share training "
            "pictures (Nadeau and Bengio 2003)."
        )
    if covered - {FOLDS}:
        yield (
            "The interval over pictures also covers another draw of test pictures, by a bootstrap over seeds "
            "and pictures (Owen 2007)."
        )
    if any(cell.difference and cell.difference.spreadless for row in rows for cell in row.cells.values()):
        yield (
            "No spread: all seeds have the same difference, so there is no interval over seeds. This is no evidence "
            "that another seed would have it, too."
        )


def _interval_notes(rows: Sequence[RowSummary]) -> Iterator[str]:
    """Why some intervals do not cover pictures."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        for path, cell in row.cells.items():
            if cell.seeds_alone:
                reasons.setdefault(cell.seeds_alone, {})[metric_label(path)] = None
    for reason, labels in reasons.items():
        yield f"Intervals of {', '.join(labels)} are over seeds alone, because {reason}."


def _plateau_notes(rows: Sequence[RowSummary], metrics: tuple[str, ...], plateau: float | None) -> Iterator[str]:
    """What the medians and the share of seeds off the plateau are."""
    if any(row.median_shown(path) for row in rows for path in metrics):
        yield (
            "A median stands beside a mean where the seeds fall into two groups: the widest gap between neighbours is "
            "at least 2/3 of their range and a quarter of the largest score"
            + ", or the plateau divides the seeds" * (plateau is not None)
            + ". Mean, deviation and t intervals of such a row describe a mixture."
        )
    if plateau is not None and metrics:
        side = "below" if lower_is_better(metrics[0]) else "above"
        yield f"Off the plateau: seeds whose {metric_label(metrics[0])} is {side} {plateau:g}."


def _gap_notes(table: PlannedTable, rows: Sequence[RowSummary], metrics: tuple[str, ...]) -> Iterator[str]:
    """Where the gap begins, and whether this row has learned to its end."""
    if metrics and any(row.cells[metrics[0]].gap for row in rows):
        yield f"Gap closed: share of the way from {table.gap_name} to the teacher, for each seed, then the mean."
    starts = [row.cells[metrics[0]].gap_start for row in rows] if metrics else []
    yield from dict.fromkeys(start.note for start in starts if start is not None and start.note)


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

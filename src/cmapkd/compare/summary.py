"""From finished runs to tables: means, paired differences, shares of the gap, and what a reader must know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cmapkd.compare.plan import Plan, PlannedTable
from cmapkd.compare.rows import Row, config_digest
from cmapkd.compare.statistics import PairedDifference, Summary, paired_difference, summarize
from cmapkd.config import closest
from cmapkd.evaluation.headline import headlines, remark_on_retrieval, retrieval_set
from cmapkd.results import Scores
from cmapkd.run import RunConfig

_LOWER = ("median_rank", "mean_rank", "params", "bad_samples")


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one row."""

    values: dict[int, float]  # by seed
    summary: Summary | None
    difference: PairedDifference | None  # to the row's reference; None for the reference itself
    gap: dict[int, float]  # by seed, share of the way from `gap_from` to the teacher: 0 is none of it, 1 all


@dataclass(frozen=True, slots=True)
class RowSummary:
    """One row of a table; the row of a teacher has no `row` and one value, under seed -1."""

    label: str
    row: Row | None
    is_reference: bool
    starts_gap: bool
    cells: dict[str, Cell]
    costs: dict[str, Summary]  # by COSTS, where the runs recorded them
    errors: dict[int, str]


@dataclass(frozen=True, slots=True)
class TableSummary:
    """A table, ready to be written."""

    title: str
    metrics: tuple[str, ...]
    reference_name: str | None
    gap_name: str | None
    teachers: tuple[RowSummary, ...]
    rows: tuple[RowSummary, ...]
    notes: tuple[str, ...]


def lookup(scores: Any, path: str) -> float | None:
    """The number at a dotted path of nested scores; None where there is none."""
    for key in path.split("."):
        scores = scores.get(key) if isinstance(scores, dict) else None
    return float(scores) if isinstance(scores, int | float) and not isinstance(scores, bool) else None


def metric_label(path: str) -> str:
    """`retrieval.i2t.r@5` as `i2t R@5`."""
    parts = [part for part in path.split(".") if part != "retrieval"]
    return " ".join(parts).replace("zero_shot", "zero-shot").replace("r@", "R@").replace("_", " ")


def lower_is_better(path: str) -> bool:
    return path.rpartition(".")[2] in _LOWER


def teacher_key(config: RunConfig) -> str | None:
    """What a teacher's scores depend on, as a digest; None without a teacher."""
    if config.teacher is None:
        return None
    measured = {"final": config.data.final, "evaluation": config.evaluation.model_dump(mode="json")}
    return config_digest({"teacher": config.teacher.model_dump(mode="json"), **measured})


def extra_parameters(metrics: Mapping[str, Any]) -> int | None:
    """Trained parameters beside the student's (projectors, weightings), where the run recorded them."""
    value = metrics.get("extra_params")
    return value if isinstance(value, int) else None


def seconds_per_step(metrics: Mapping[str, Any]) -> float | None:
    """Wall time of a training step, where the run recorded it; as slow as the machine was busy."""
    seconds, steps = metrics.get("train_seconds"), metrics.get("steps")
    return seconds / steps if seconds is not None and steps else None


COSTS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "s/step": seconds_per_step,
    "peak MiB": lambda metrics: metrics["peak_memory_bytes"] / 2**20 if metrics.get("peak_memory_bytes") else None,
    "extra parameters": extra_parameters,
}
"""What a run took: the heads of the columns, and where a run's metrics say it."""


def summarize_tables(
    plan: Plan,
    metrics: Mapping[str, dict[str, Any]],
    errors: Mapping[str, str],
    teachers: Mapping[str, Scores],
) -> tuple[TableSummary, ...]:
    """The tables of a plan.

    Args:
        metrics: digest -> content of metrics.json of each finished run; errors: digest -> message of each failed one.
        teachers: `teacher_key` -> the teacher's scores on further test data, by the name of the data.
    """
    return tuple(_summarize(plan, table, metrics, errors, teachers) for table in plan.tables)


def _summarize(
    plan: Plan,
    table: PlannedTable,
    metrics: Mapping[str, dict[str, Any]],
    errors: Mapping[str, str],
    teachers: Mapping[str, Scores],
) -> TableSummary:
    done = [
        {seed: metrics[run.digest] for seed, run in row.runs.items() if run.digest in metrics} for row in table.rows
    ]
    chosen, notes = _choose_metrics(plan, table, done)
    taught = _teachers(table, done, teachers)
    values = {
        path: [_numbers({seed: run["student"] for seed, run in runs.items()}, path) for runs in done] for path in chosen
    }
    rows = []
    for place, row in enumerate(table.rows):
        key = teacher_key(row.config)
        if key is None and len(taught) == 1:  # a row without a teacher is seen against the one that there is
            key = next(iter(taught))
        teacher = taught[key][1] if key in taught else {}
        cells = {}
        for path in chosen:
            own, reference, start = values[path][place], table.reference[place], table.gap_from[place]
            difference = None
            if reference is not None and reference != place:
                difference = paired_difference(own, values[path][reference], lower_is_better=lower_is_better(path))
            gap = {} if start is None else _gap(path, own, values[path][start], lookup(teacher, path))
            cells[path] = Cell(own, summarize(own.values()), difference, gap)
        costs = {}
        for name, cost in COSTS.items():
            found = [number for run in done[place].values() if (number := cost(run)) is not None]
            if (summary := summarize(found)) is not None:
                costs[name] = summary
        failed = {seed: errors[run.digest] for seed, run in row.runs.items() if run.digest in errors}
        is_reference, starts_gap = table.reference[place] == place, table.gap_from[place] == place
        rows.append(RowSummary(row.label, row, is_reference, starts_gap, cells, costs, failed))
    return TableSummary(
        title=table.title,
        metrics=chosen,
        reference_name=table.reference_name,
        gap_name=table.gap_name,
        teachers=tuple(_teacher_row(name, scores, chosen) for name, scores in taught.values()),
        rows=tuple(rows),
        notes=(*notes, *_sets(chosen, done), *_notes(plan, table, rows, done)),
    )


def _choose_metrics(
    plan: Plan, table: PlannedTable, done: list[dict[int, dict[str, Any]]]
) -> tuple[tuple[str, ...], list[str]]:
    """The metrics of a table; a named one that no run has is kept, empty, and noted."""
    known = dict.fromkeys(path for runs in done for run in runs.values() for path in _paths(run["student"]))
    if table.metrics is None:
        sets = ("", *(f"{name}." for name in plan.comparison.evaluate))
        names = dict.fromkeys(
            before + path
            for before in sets
            for runs in done
            for run in runs.values()
            for path in _headlines(run, before)
        )
        return tuple(name for name in names if name in known), []
    missing = [path for path in table.metrics if path not in known] if known else []
    return table.metrics, [f"No run has the metric {path}{closest(path, known)}." for path in missing]


def _headlines(run: Mapping[str, Any], before: str) -> list[str]:
    """Paths of the headlines of a run's student, on its final data or on further test data (`before` is `NAME.`)."""
    scores = run["student"].get(before.rstrip("."), {}) if before else run["student"]
    return [".".join((task, *headline.path)) for task, (headline, _) in headlines(scores).items()]


def _paths(scores: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(scores, dict):
        for key, value in scores.items():
            yield from _paths(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(scores, int | float):
        yield prefix


def _numbers(students: Mapping[int, Scores], path: str) -> dict[int, float]:
    return {seed: value for seed, scores in students.items() if (value := lookup(scores, path)) is not None}


def _gap(path: str, own: dict[int, float], start: dict[int, float], teacher: float | None) -> dict[int, float]:
    """Share of the way from `start` to the teacher, of the seeds where there is a way."""
    sign = -1 if lower_is_better(path) else 1
    return {
        seed: (own[seed] - start[seed]) / (teacher - start[seed])
        for seed in own
        if teacher is not None and seed in start and sign * (teacher - start[seed]) > 0
    }


def _teachers(
    table: PlannedTable, done: list[dict[int, dict[str, Any]]], further: Mapping[str, Scores]
) -> dict[str, tuple[str, Scores]]:
    """`teacher_key` -> name and scores of each teacher of the table that was measured."""
    found: dict[str, tuple[str, Scores]] = {}
    for row, runs in zip(table.rows, done, strict=True):
        key, config = teacher_key(row.config), row.config
        scores = next((run["teacher"] for run in runs.values() if run.get("teacher")), None)
        if key is not None and key not in found and scores is not None:
            assert config.teacher is not None
            same = sum(name.startswith(f"teacher {config.teacher.name}") for name, _ in found.values())
            name = f"teacher {config.teacher.name}" + (f" on {config.data.final}" if same else "")
            found[key] = (name, scores | further.get(key, {}))
    return found


def _teacher_row(name: str, scores: Scores, metrics: tuple[str, ...]) -> RowSummary:
    cells = {}
    for path in metrics:
        value = lookup(scores, path)
        own = {} if value is None else {-1: value}
        cells[path] = Cell(own, summarize(own.values()), None, {})
    return RowSummary(name, None, False, False, cells, {}, {})


def _notes(
    plan: Plan, table: PlannedTable, rows: list[RowSummary], done: list[dict[int, dict[str, Any]]]
) -> Iterator[str]:
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


def _sets(chosen: tuple[str, ...], done: list[dict[int, dict[str, Any]]]) -> Iterator[str]:
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

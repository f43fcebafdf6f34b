"""From finished runs to tables: means, paired differences, shares of the gap, and what a reader must know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from cmapkd.compare.gap import GapStart, check_start, share_of_gap
from cmapkd.compare.metric import lookup, lower_is_better
from cmapkd.compare.notes import retrieval_notes, table_notes
from cmapkd.compare.pictures import KeptRanks, NoPictures, resampled_difference, split_metric
from cmapkd.compare.plan import Plan, PlannedTable
from cmapkd.compare.rows import Row, config_digest
from cmapkd.compare.statistics import Estimate, PairedDifference, Summary, paired_difference, summarize
from cmapkd.compare.tables import Cell, RowSummary, TableSummary
from cmapkd.compare.verdicts import Contrast, judge
from cmapkd.config import closest
from cmapkd.evaluation.headline import headlines
from cmapkd.results import Scores
from cmapkd.run import RunConfig


def teacher_key(config: RunConfig) -> str | None:
    """What a teacher's scores depend on, as a digest; None without a teacher."""
    if config.teacher is None:
        return None
    measured: dict[str, Any] = {"final": config.data.final, "evaluation": config.evaluation.model_dump(mode="json")}
    if config.classifies:  # whose automatic tasks are others
        measured["classifies"] = True
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


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What a comparison's runs left: by digest of the run."""

    metrics: Mapping[str, dict[str, Any]]  # content of metrics.json of each finished run
    errors: Mapping[str, str]  # message of each failed run
    teachers: Mapping[str, Scores]  # `teacher_key` -> scores on further test data, by the name of the data
    folders: Mapping[str, Path]
    ranks: KeptRanks
    data: Mapping[str, str]  # the comparison's further test data: name -> source
    gap_rising: float | None

    def finished(self, row: Row) -> dict[int, dict[str, Any]]:
        """The metrics of a row's finished runs, by seed."""
        return {seed: self.metrics[run.digest] for seed, run in row.runs.items() if run.digest in self.metrics}

    def values(self, row: Row, path: str) -> dict[int, float]:
        """One metric of a row's finished runs, by seed."""
        return _known({seed: lookup(run["student"], path) for seed, run in self.finished(row).items()})

    def difference(self, row: Row, reference: Row, path: str) -> _Difference:
        """A paired difference of two rows, with the chance of pictures where the runs keep their ranks."""
        paired = paired_difference(
            self.values(row, path), self.values(reference, path), lower_is_better=lower_is_better(path)
        )
        if paired is None:
            return _Difference(None, None, "")
        runs, others = ({seed: run.digest for seed, run in each.runs.items()} for each in (row, reference))
        try:
            two_way = resampled_difference(self.ranks, runs, others, *split_metric(path, self.data), paired)
        except NoPictures as error:
            return _Difference(paired, None, "" if paired.spreadless else str(error))
        return _Difference(paired, two_way, "")

    def gap_start(self, row: Row, path: str) -> GapStart:
        """Whether a gap may begin at a row."""
        steps = {seed: int(run["steps"]) for seed, run in self.finished(row).items() if run.get("steps")}
        return check_start(row, split_metric(path, self.data)[1], steps, self.folders, self.gap_rising)


def off_plateau(values: Mapping[int, float], path: str, plateau: float) -> tuple[int, int]:
    """How many seeds have left the plateau, of how many: those with a score beyond it."""
    sign = -1 if lower_is_better(path) else 1
    return sum(sign * value > sign * plateau for value in values.values()), len(values)


_Keys = tuple[str | None, ...]  # `teacher_key` of each seed of a row


class _Teachers(NamedTuple):
    name: str
    scores: dict[int, Scores]  # by seed
    one: bool  # the same for all seeds: there are no folds


class _Difference(NamedTuple):
    paired: PairedDifference | None
    two_way: Estimate | None
    reason: str  # why there is no two-way estimate; empty where there is one, or where seeds give none either


def summarize_tables(
    plan: Plan,
    metrics: Mapping[str, dict[str, Any]],
    errors: Mapping[str, str],
    teachers: Mapping[str, Scores],
    folders: Mapping[str, Path],
) -> tuple[TableSummary, ...]:
    """The tables of a plan.

    Args:
        metrics: digest -> content of metrics.json of each finished run; errors: digest -> message of each failed one.
        teachers: `teacher_key` -> the teacher's scores on further test data, by the name of the data.
        folders: digest -> folder of each run.
    """
    data = plan.comparison.evaluate
    evidence = _Evidence(metrics, errors, teachers, folders, KeptRanks(folders, data), data, plan.comparison.gap_rising)
    tables = [_summarize(plan, table, evidence) for table in plan.tables]
    contrasts = [
        _contrasts(planned, table.metrics, evidence) for planned, table in zip(plan.tables, tables, strict=True)
    ]
    tested = iter(judge([contrast for each in contrasts for contrast in each]))  # one family: all of the file
    return tuple(
        replace(table, contrasts=tuple(next(tested) for _ in each))
        for table, each in zip(tables, contrasts, strict=True)
    )


def _contrasts(table: PlannedTable, metrics: tuple[str, ...], evidence: _Evidence) -> list[Contrast]:
    """The declared contrasts of a table with their data, not yet tested."""
    contrasts = []
    for planned in table.contrasts:
        arm, against = table.rows[planned.arm], table.rows[planned.against]
        metric = planned.declared.metric or next(iter(metrics), "")
        paired, two_way, reason = evidence.difference(arm, against, metric)
        runs = frozenset(tuple(run.digest for run in row.runs.values()) for row in (arm, against))
        contrasts.append(
            Contrast(
                arm=arm.label,
                against=against.label,
                metric=metric,
                smallest=planned.declared.smallest,
                difference=paired,
                estimate=two_way if two_way or paired is None else paired.estimate,
                family_key=(runs, metric, planned.declared.smallest),
                remark=f"the interval is over seeds alone, because {reason}" if reason else "",
            )
        )
    return contrasts


def _summarize(plan: Plan, table: PlannedTable, evidence: _Evidence) -> TableSummary:
    done = [evidence.finished(row) for row in table.rows]
    metrics, notes = _choose_metrics(plan, table, done)
    plateau = plan.comparison.plateau_of(table.title)
    teachers = _teachers(table, done, evidence.teachers)
    rows = []
    for place, row in enumerate(table.rows):
        teacher = _teacher_of(row, teachers)
        cells = {path: _cell(table, place, path, teacher, evidence) for path in metrics}
        failed = {seed: evidence.errors[run.digest] for seed, run in row.runs.items() if run.digest in evidence.errors}
        is_reference, starts_gap = table.reference[place] == place, table.gap_from[place] == place
        off = off_plateau(cells[metrics[0]].values, metrics[0], plateau) if metrics and plateau is not None else None
        rows.append(RowSummary(row.label, row, is_reference, starts_gap, cells, _costs(done[place]), failed, off))
    return TableSummary(
        title=table.title,
        metrics=metrics,
        reference_name=table.reference_name,
        gap_name=table.gap_name,
        teachers=tuple(_teacher_row(each, metrics) for each in teachers.values()),
        rows=tuple(rows),
        notes=(*notes, *retrieval_notes(metrics, done), *table_notes(plan, table, rows, done, metrics, plateau)),
        plateau=plateau,
        num_seeds=max(map(len, done), default=0),
    )


def _cell(table: PlannedTable, place: int, path: str, teacher: Mapping[int, Scores], evidence: _Evidence) -> Cell:
    """One metric of a row.

    Args:
        teacher: scores of the teacher that the row's gap leads to, by seed.
    """
    row, reference, start = table.rows[place], table.reference[place], table.gap_from[place]
    values = evidence.values(row, path)
    cell = Cell(values, summarize(values.values()), None, {})
    if reference is not None and reference != place:
        paired, two_way, reason = evidence.difference(row, table.rows[reference], path)
        cell = replace(cell, difference=paired, two_way=two_way, seeds_alone=reason)
    if start is None:
        return cell
    start_row = table.rows[start]
    start_values = evidence.values(start_row, path)
    goals = _known({seed: lookup(scores, path) for seed, scores in teacher.items()})
    gap = share_of_gap(values, start_values, goals, lower_is_better=lower_is_better(path))
    if not gap:
        return cell
    checked = evidence.gap_start(start_row, path)
    return replace(cell, gap={} if checked.withheld else gap, gap_start=checked)


def _costs(runs: Mapping[int, dict[str, Any]]) -> dict[str, Summary]:
    costs = {}
    for name, cost in COSTS.items():
        recorded = [number for run in runs.values() if (number := cost(run)) is not None]
        if (summary := summarize(recorded)) is not None:
            costs[name] = summary
    return costs


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


def unknown_metrics(plan: Plan, run: Mapping[str, Any]) -> list[str]:
    """A remark on each metric that the comparison names and a finished run lacks, as the others then hardly have it.

    Args:
        run: of its `metrics.json`, the student's with further test data.
    """
    known = [*_paths(run["student"])]
    tables = [path for table in plan.tables for path in table.metrics or ()]
    contrasts = [each.declared.metric for table in plan.tables for each in table.contrasts]
    lacking = [path for path in dict.fromkeys((*tables, *contrasts)) if path is not None and path not in known]
    return [f"The first finished run has no metric {path}{closest(path, known)}." for path in lacking]


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


def _teachers(
    table: PlannedTable, done: list[dict[int, dict[str, Any]]], further: Mapping[str, Scores]
) -> dict[_Keys, _Teachers]:
    """The teachers of a table's rows that were measured: without folds one serves all seeds of a row."""
    scores: dict[str, Scores] = {}
    for row, runs in zip(table.rows, done, strict=True):
        for seed, run in runs.items():
            key = teacher_key(row.runs[seed].config)
            if key is not None and run.get("teacher"):
                scores.setdefault(key, run["teacher"] | further.get(key, {}))
    teachers: dict[_Keys, _Teachers] = {}
    for row in table.rows:
        keys = _teacher_keys(row)
        by_seed = {seed: scores[key] for seed, key in zip(row.runs, keys, strict=True) if key in scores}
        if keys in teachers or not by_seed:
            continue
        configs = [run.config for run in row.runs.values() if run.config.teacher is not None]
        names = dict.fromkeys(config.teacher.name for config in configs if config.teacher is not None)
        name = f"teacher {next(iter(names))}" if len(names) == 1 else "teachers of the folds"
        if any(other.name.startswith(name) for other in teachers.values()):
            name += f" on {configs[0].data.final}"
        teachers[keys] = _Teachers(name, by_seed, one=len(set(keys)) == 1)
    return teachers


def _teacher_keys(row: Row) -> _Keys:
    return tuple(teacher_key(run.config) for run in row.runs.values())


def _teacher_of(row: Row, teachers: Mapping[_Keys, _Teachers]) -> dict[int, Scores]:
    """The scores by seed that a row's gap leads to: its own teachers', or those of the only ones that there are."""
    keys = _teacher_keys(row)
    if not any(keys) and len(teachers) == 1:
        keys = next(iter(teachers))
    return teachers[keys].scores if keys in teachers else {}


def _teacher_row(teachers: _Teachers, metrics: tuple[str, ...]) -> RowSummary:
    cells = {}
    for path in metrics:
        values = _known({seed: lookup(scores, path) for seed, scores in teachers.scores.items()})
        if teachers.one and values:
            values = {-1: next(iter(values.values()))}
        cells[path] = Cell(values, summarize(values.values()), None, {})
    return RowSummary(teachers.name, None, False, False, cells, {}, {})


def _known(values: Mapping[int, float | None]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if value is not None}

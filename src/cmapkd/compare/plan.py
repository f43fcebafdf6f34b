"""Which runs a comparison needs: every row's resolved config, its folder's name, and what it is compared with."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmapkd.compare.arms import Arm, later_tasks
from cmapkd.compare.config import ComparisonConfig
from cmapkd.compare.contrasts import PlannedContrast, plan_contrasts, refuse_unplaced
from cmapkd.compare.coordinates import counterparts, find_coordinate
from cmapkd.compare.equal_time import Seconds, with_equal_time
from cmapkd.compare.resolve import Resolver, layers_of, settings_of
from cmapkd.compare.rows import PlannedRun, Row, planned_run
from cmapkd.compare.winners import Tuned
from cmapkd.config import ConfigError, closest
from cmapkd.config.leaves import leaves
from cmapkd.methods import METHODS
from cmapkd.results import is_finished
from cmapkd.run import RunConfig


@dataclass(frozen=True, slots=True)
class PlannedTable:
    """Rows, and for each row the place of its reference and of the row where its gap begins."""

    title: str
    rows: tuple[Row, ...]
    reference_name: str | None
    reference: tuple[int | None, ...]
    gap_name: str | None
    gap_from: tuple[int | None, ...]
    metrics: tuple[str, ...] | None
    foreign: dict[str, list[str]]  # setting of all arms -> labels of the rows whose method does not have it
    contrasts: tuple[PlannedContrast, ...] = ()
    budgets: tuple[str, ...] = ()  # of tuning and of time: what was given to each arm

    def remarks(self) -> Iterable[str]:
        """What tuning and time each arm had; settings that do not reach an arm, and arms that come to the same runs."""
        yield from self.budgets
        for setting, labels in self.foreign.items():
            yield f"{setting} does not reach {' and '.join(labels)}: the method there has no such setting."
        by_runs: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            by_runs.setdefault(tuple(run.digest for run in row.runs.values()), []).append(row)
        for rows in by_runs.values():
            if len({row.coordinates.get("arm") for row in rows}) > 1:
                yield f"{' and '.join(row.label for row in rows)} are the same: their settings come to one config."


@dataclass(frozen=True, slots=True)
class Plan:
    """All tables of a comparison, and each distinct run once: all arms of the first seed first."""

    comparison: ComparisonConfig
    tables: tuple[PlannedTable, ...]
    runs: tuple[PlannedRun, ...]

    def remarks(self) -> Iterable[str]:
        """What was probably not meant, in any table."""
        return itertools.chain.from_iterable(table.remarks() for table in self.tables)

    def state(self, run: PlannedRun, out: Path) -> str:
        """`finished`, `begun` or `new`, by what is in the run's folder."""
        folder = self.folder(run, out)
        if is_finished(folder):
            return "finished"
        return "begun" if (folder / "config.yaml").is_file() else "new"

    @staticmethod
    def folder(run: PlannedRun, out: Path) -> Path:
        """Where a run is, or will be: one of the same config under another name (arms may be renamed) counts."""
        named = out / "runs" / run.name
        if named.exists():
            return named
        return next(iter(sorted((out / "runs").glob(f"*-{run.digest}"))), named)


def make_plan(comparison: ComparisonConfig, tuned: Tuned | None = None, seconds: Seconds | None = None) -> Plan:
    """Resolves every run before the first one starts, so that a mistake shows at once.

    Every run has `baseline: none` and its seed from `seeds`; a method that uses no teacher has none in its config, so
    that it is one run whatever teacher the others have.

    Args:
        tuned: settings that tuning gave the comparison's arms, over their own; axes go over both.
        seconds: what a step of each arm takes, for rows at equal time; none: given seconds, or equal ones for now.
    Raises:
        ConfigError: lists the problems of all arms.
    """
    resolver = Resolver.of(comparison)
    shared = resolver.shared
    folds = {seed: comparison.folds.get(seed, {}) for seed in comparison.seeds}
    problems: dict[str, list[str]] = {}  # what is wrong -> labels of the rows where it is
    unique: dict[str, PlannedRun] = {}
    tables = []
    for title in comparison.tables or ("",):
        arms = comparison.table_arms(title) if title else comparison.arms
        axes = comparison.table_axes(title) if title else comparison.axes
        foreign: dict[str, list[str]] = {}
        own = title and isinstance(comparison.tables[title].arms, dict)  # arms of the table, which none has tuned
        chosen = {} if own or tuned is None else {arm: tuned.settings_of(arm) for arm in arms}
        rows = list(_rows(resolver, arms, chosen, axes, folds, unique, problems, foreign))
        if not problems:
            notes = [] if own or tuned is None else list(tuned.notes(_by_arm(rows)))
            if comparison.equal_time is not None:
                rows, more = with_equal_time(rows, unique, seconds or Seconds(comparison.equal_time, None))
                notes += more
            tables.append(_table(comparison, title, rows, foreign, tuple(notes)))
    for setting in shared.settings:
        if not problems and all(len(table.foreign.get(setting, ())) == len(table.rows) for table in tables):
            known = {field for row in tables[0].rows for field in type(row.config.method).model_fields}
            name = setting.partition("=")[0].split(".")[1]
            problems[f"{setting} reaches no arm: none of their methods has such a setting{closest(name, known)}"] = []
    if problems:
        lines = [_where(labels) + what for what, labels in problems.items()]
        head = f"{len(lines)} problem{'s'[: len(lines) != 1]} in the arms of this comparison:\n  "
        raise ConfigError(head + "\n  ".join(lines), tuple(lines))
    refuse_unplaced(comparison, [(table.title, table.rows, table.contrasts) for table in tables])
    place = {seed: number for number, seed in enumerate(comparison.seeds)}
    return Plan(comparison, tuple(tables), tuple(sorted(unique.values(), key=lambda run: place[run.config.seed])))


def _where(labels: Sequence[str], shown: int = 3) -> str:
    """Begins a line about these rows: `a: `, `a; b; c and 21 more rows: `."""
    labels = list(dict.fromkeys(labels))
    more = len(labels) - shown
    rest = f" and {more} more row{'s'[: more != 1]}" if more > 0 else ""
    return "; ".join(labels[:shown]) + rest + ": " if labels else ""


def _rows(
    resolver: Resolver,
    arms: dict[str, Arm],
    chosen: Mapping[str, dict[str, Any]],
    axes: dict[str, dict[str, Any]],
    folds: Mapping[int, dict[str, Any]],
    unique: dict[str, PlannedRun],
    problems: dict[str, list[str]],
    foreign: dict[str, list[str]],
) -> Iterable[Row]:
    for arm, *labels in itertools.product(arms or ("",), *axes.values()):
        at = dict(zip(axes, labels, strict=True))
        coordinates = ({"arm": arm} if arms else {}) | at
        parts = ([arm] if arms else []) + [_axis_part(key, axes, label) for key, label in at.items()]
        label = ", ".join(parts)
        try:
            layers = [settings_of(arms[arm], f"arm {arm!r}")] if arms else []
            layers += layers_of(chosen.get(arm, {}), f"arm {arm!r}, tuned")
            layers += layers_of({key: axes[key][at[key]] for key in axes}, "axes")
            configs, without = dict[int, RunConfig](), list[str]()
            for seed, fold in folds.items():
                if fold or not configs:  # without folds the others differ in the seed alone
                    own = layers_of(fold, f"folds, seed {seed}")
                    _refuse_set_twice(layers, own)
                    config, without = resolver.resolve([*layers, *own], seed=seed, where=label)
                configs[seed] = config
            later = [
                resolver.resolve(
                    [*layers, settings_of(each, f"arm {arm!r}, run {number}")],
                    seed=next(iter(folds)),
                    where=f"{label}, run {number}",
                )[0]
                for number, each in enumerate(later_tasks(arms[arm]) if arms else (), 2)
            ]
        except ConfigError as error:
            for line in error.problems:
                problems.setdefault(line, []).append(label)
            if not error.problems:
                problems.setdefault(str(error), [])
            continue
        for setting in dict.fromkeys(without):
            foreign.setdefault(setting, []).append(label)
        runs = {}
        for seed, config in configs.items():
            run = planned_run(config, seed, parts)
            run = unique.setdefault(run.digest, run)
            for number, each in enumerate(later, 2):
                run = planned_run(each, seed, [*parts, f"run{number}"], after=run)
                run = unique.setdefault(run.digest, run)
            runs[seed] = run
        yield Row(coordinates, label, runs)


def _refuse_set_twice(layers: Iterable[dict[str, Any]], fold: Iterable[dict[str, Any]]) -> None:
    """Refuses a fold that would undo what an arm or an axis sets.

    Raises:
        ConfigError: names the setting.
    """
    ours, folds = ({key for layer in each for key, _ in leaves(layer)} for each in (layers, fold))
    for key in sorted(ours):
        if any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in folds):
            what = f"it sets {key}, and the folds set it anew for each seed: leave it out of one of them"
            raise ConfigError(what, (what,))


def _by_arm(rows: Iterable[Row]) -> dict[str, list[RunConfig]]:
    configs: dict[str, list[RunConfig]] = {}
    for row in rows:
        if "arm" in row.coordinates:
            configs.setdefault(row.coordinates["arm"], []).append(row.config)
    return configs


def _table(
    comparison: ComparisonConfig, title: str, rows: list[Row], foreign: dict[str, list[str]], budgets: tuple[str, ...]
) -> PlannedTable:
    table = comparison.tables.get(title)
    reference = (table and table.reference) or comparison.reference
    gap_from = (table and table.gap_from) or comparison.gap_from
    scratch = _scratch(rows)
    where = f"table {title!r}" if title else "this comparison"
    return PlannedTable(
        title=title,
        rows=tuple(rows),
        reference_name=reference or (scratch and scratch[1]),
        reference=counterparts(
            rows, find_coordinate(rows, reference, f"reference of {where}") if reference else scratch
        ),
        gap_name=gap_from or (scratch and scratch[1]),
        gap_from=counterparts(rows, find_coordinate(rows, gap_from, f"gap_from of {where}") if gap_from else scratch),
        metrics=(table and table.metrics) or comparison.metrics,
        foreign=foreign,
        contrasts=plan_contrasts(comparison, title, rows),
        budgets=budgets,
    )


def _scratch(rows: list[Row]) -> tuple[str, str] | None:
    """The one arm or axis value whose rows, and only some of all, train as a student does alone."""
    matches = []
    for key, value in dict.fromkeys(pair for row in rows for pair in row.coordinates.items()):
        there = [row for row in rows if row.coordinates[key] == value]
        methods = {row.config.method.name for row in there}
        if len(there) < len(rows) and all(METHODS[name].scratch == name for name in methods):
            matches.append((key, value))
    return matches[0] if len(matches) == 1 else None


def _axis_part(key: str, axes: dict[str, dict[str, Any]], label: str) -> str:
    """A value's part of the row's label: alone where it is a name that no other axis has, else with its key."""
    others = [other for name in axes if name != key for other in axes[name]]
    if re.match(r"[A-Za-z]", label) and label not in ("true", "false", "none") and label not in others:
        return label
    last = key.rpartition(".")[2]
    ambiguous = sum(name.rpartition(".")[2] == last for name in axes) > 1
    return f"{key if ambiguous else last}={label}"

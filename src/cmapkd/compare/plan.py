"""Which runs a comparison needs: every row's resolved config, its folder's name, and what it is compared with."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmapkd.compare.config import Arm, ComparisonConfig
from cmapkd.compare.contrasts import PlannedContrast, plan_contrasts, refuse_unplaced
from cmapkd.compare.coordinates import counterparts, find_coordinate
from cmapkd.config import ConfigError, apply_overrides, closest, load_mapping, merge_mappings
from cmapkd.methods import METHODS
from cmapkd.run import RunConfig

_OURS = {"seed": "list the seeds in `seeds`", "baseline": "make scratch training an arm (method: contrastive)"}


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run folder."""

    config: RunConfig
    digest: str  # of the resolved config: equal configs are one run
    name: str


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: an arm at one value of every axis, with a run for each seed."""

    coordinates: dict[str, str]  # `arm` (where there are arms) and the axes -> name or label
    label: str
    runs: dict[int, PlannedRun]

    @property
    def config(self) -> RunConfig:
        """The config of the first seed; the others differ in the seed alone."""
        return next(iter(self.runs.values())).config


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

    def remarks(self) -> Iterable[str]:
        """What was probably not meant: settings that do not reach an arm, and arms that come to the same runs."""
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
        if (folder / "metrics.json").is_file():
            return "finished"
        return "begun" if (folder / "config.yaml").is_file() else "new"

    @staticmethod
    def folder(run: PlannedRun, out: Path) -> Path:
        """Where a run is, or will be: one of the same config under another name (arms may be renamed) counts."""
        named = out / "runs" / run.name
        if named.exists():
            return named
        return next(iter(sorted((out / "runs").glob(f"*-{run.digest}"))), named)


def make_plan(comparison: ComparisonConfig) -> Plan:
    """Resolves every run before the first one starts, so that a mistake shows at once.

    Every run has `baseline: none` and its seed from `seeds`; a method that uses no teacher has none in its config, so
    that it is one run whatever teacher the others have.

    Raises:
        ConfigError: lists the problems of all arms.
    """
    _refuse_ours(apply_overrides({}, comparison.overrides, where="overrides"), "overrides")
    base = load_mapping(comparison.base, comparison.overrides) | {"baseline": "none"}
    shared = _Shared.of(comparison.overrides, base)
    problems: dict[str, list[str]] = {}  # what is wrong -> labels of the rows where it is
    unique: dict[str, PlannedRun] = {}
    tables = []
    for title in comparison.tables or ("",):
        arms = comparison.table_arms(title) if title else comparison.arms
        axes = comparison.table_axes(title) if title else comparison.axes
        foreign: dict[str, list[str]] = {}
        rows = list(_rows(base, shared, arms, axes, comparison.seeds, unique, problems, foreign))
        if not problems:
            tables.append(_table(comparison, title, rows, foreign))
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


class _Shared:
    """Settings of all arms, which an arm that names a section anew (`method: hinton`, `student: tiny:small`) keeps."""

    def __init__(self, settings: dict[str, dict[str, Any]]) -> None:
        self.settings = settings  # as written -> nested

    @classmethod
    def of(cls, overrides: Sequence[str], base: dict[str, Any]) -> _Shared:
        nested = {each: apply_overrides({}, [each], where="overrides") for each in overrides}
        # a later override may have named the section anew itself
        return cls({each: layer for each, layer in nested.items() if not _below_a_name(layer, base)})

    def over(self, values: dict[str, Any], settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """`settings` over `values`, where a section that they only name keeps what all arms share.

        Returns:
            the values, and the shared settings that the method named does not have.
        """
        values = merge_mappings(values, settings)
        lost = {each: layer for each, layer in self.settings.items() if _below_a_name(layer, values)}
        foreign = [each for each, layer in lost.items() if _is_foreign(layer, values)]
        for each, layer in lost.items():
            if each not in foreign:
                values = merge_mappings(values, layer)
        return values, foreign


def _is_foreign(layer: dict[str, Any], values: dict[str, Any]) -> bool:
    """Whether `layer` sets what the method that `values` name does not have."""
    name = values.get("method")
    if "method" not in layer or not isinstance(name, str) or name not in METHODS:
        return False  # a name that is wrong is refused later
    return not layer["method"].keys() <= METHODS[name].Config.model_fields.keys()


def _below_a_name(layer: Any, values: Any) -> bool:
    """Whether `layer` sets something in a section of which `values` hold the name alone."""
    if isinstance(values, str):
        return isinstance(layer, dict)
    return (
        isinstance(layer, dict)
        and isinstance(values, dict)
        and any(key in values and _below_a_name(below, values[key]) for key, below in layer.items())
    )


def _rows(
    base: dict[str, Any],
    shared: _Shared,
    arms: dict[str, Arm],
    axes: dict[str, dict[str, Any]],
    seeds: Sequence[int],
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
            settings = _settings(arms[arm], f"arm {arm!r}") if arms else {}
            values, without = shared.over(base, settings)
            for key in sorted(axes, key=lambda key: key.count(".")):  # method before method.temperature
                values, more = shared.over(values, _settings({key: axes[key][at[key]]}, f"axis {key!r}"))
                without += more
            for setting in dict.fromkeys(without):
                foreign.setdefault(setting, []).append(label)
            config = RunConfig.from_mapping(values | {"seed": seeds[0]}, where=label)
        except ConfigError as error:
            for line in error.problems:
                problems.setdefault(line, []).append(label)
            if not error.problems:
                problems.setdefault(str(error), [])
            continue
        if not METHODS[config.method.name].uses_teacher:
            if config.student.inherit is not None and config.student.inherit.name == "teacher":
                assert config.teacher is not None  # else the config had been refused
                what = (
                    f"method {config.method.name} is compared without a teacher, so student.inherit cannot be teacher: "
                    f"name the model itself, inherit: {config.teacher.name}"
                )
                problems.setdefault(what, []).append(label)
                continue
            config = config.without_teachers()
        runs = {}
        for seed in seeds:
            seeded = config.model_copy(update={"seed": seed})
            digest = config_digest(seeded.plain())
            name = "-".join(_slug(part) for part in parts)[:80] + f"-seed{seed}-{digest}"
            runs[seed] = unique.setdefault(digest, PlannedRun(seeded, digest, name))
        yield Row(coordinates, label, runs)


def _settings(arm: Arm, where: str) -> dict[str, Any]:
    """An arm's settings as one nested mapping; keys may be dotted."""
    settings: dict[str, Any] = {}
    if isinstance(arm, dict):
        for key, value in arm.items():
            for part in reversed(str(key).split(".")):
                value = {part: value}
            settings = merge_mappings(settings, value)
    else:
        settings = apply_overrides({}, arm, where=where)
    _refuse_ours(settings, where)
    return settings


def _refuse_ours(settings: dict[str, Any], where: str) -> None:
    for key, instead in _OURS.items():
        if key in settings:
            raise ConfigError(f"{where}: a comparison sets {key} itself: {instead}")


def _table(comparison: ComparisonConfig, title: str, rows: list[Row], foreign: dict[str, list[str]]) -> PlannedTable:
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
    )


def _scratch(rows: list[Row]) -> tuple[str, str] | None:
    """The one arm or axis value whose rows, and only some of all, train without a teacher."""
    matches = []
    for key, value in dict.fromkeys(pair for row in rows for pair in row.coordinates.items()):
        there = [row for row in rows if row.coordinates[key] == value]
        if len(there) < len(rows) and not any(METHODS[row.config.method.name].uses_teacher for row in there):
            matches.append((key, value))
    return matches[0] if len(matches) == 1 else None


def config_digest(values: Any) -> str:
    """Eight hex digits of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _axis_part(key: str, axes: dict[str, dict[str, Any]], label: str) -> str:
    """A value's part of the row's label: alone where it is a name that no other axis has, else with its key."""
    others = [other for name in axes if name != key for other in axes[name]]
    if re.match(r"[A-Za-z]", label) and label not in ("true", "false", "none") and label not in others:
        return label
    last = key.rpartition(".")[2]
    ambiguous = sum(name.rpartition(".")[2] == last for name in axes) > 1
    return f"{key if ambiguous else last}={label}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "_", text.replace("=", "")).strip("_.") or "arm"

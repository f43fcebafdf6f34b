"""Runs that differ in their seed alone, taken together: means, intervals over seeds, paired differences."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cmapkd.compare.statistics import Estimate, paired_difference, summarize, t_critical
from cmapkd.evaluation.headline import headlines
from cmapkd.evaluation.tasks import Headline
from cmapkd.report.plain import mapping, number, sequence, string, whole
from cmapkd.report.read import RunFolder, model_name

_OF_RUN = re.compile(r"-seed\d+-[0-9a-f]{8}/student$")


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds, with its 95 % t interval where there are several; units of the values."""

    value: float
    interval: tuple[float, float] | None
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs of one config, which differ in their seed.

    Attributes:
        place: the last parts of the first run's path, where another arm would have the same name.
    """

    runs: tuple[RunFolder, ...]
    place: str = ""

    @property
    def first(self) -> RunFolder:
        return self.runs[0]

    @property
    def method(self) -> str:
        return string(self.first.metrics, "method") or model_name(self.first.config, "method") or "unknown method"

    @property
    def name(self) -> str:
        """The folder of a single run; of several the method and the student."""
        if len(self.runs) == 1:
            return self.place or self.first.name
        name = f"{self.method}, {model_name(self.first.config, 'student') or 'student'}"
        return f"{name}, {self.place}" if self.place else name

    @property
    def finished(self) -> tuple[RunFolder, ...]:
        return tuple(run for run in self.runs if run.finished)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(seed_of(run) for run in self.finished)

    @property
    def baseline_name(self) -> str:
        return next((string(run.metrics, "baseline_name") or "baseline" for run in self.finished), "baseline")

    @property
    def data(self) -> str | None:
        return next((string(run.metrics, "evaluated_on") for run in self.finished), None)

    def scores(self, role: str) -> tuple[dict[str, Any], ...]:
        """Of teacher, student or baseline, by run; only those that were measured."""
        return tuple(filter(None, (mapping(run.metrics, role) for run in self.finished)))

    def mean(self, role: str, *path: str) -> Mean | None:
        return mean_of(self.scores(role), *path)

    def difference(self, *path: str) -> Estimate | float | None:
        """Student minus baseline, paired by seed: an estimate of several seeds, the difference itself of one."""
        student, baseline = (self._by_seed(role, path) for role in ("student", "baseline"))
        paired = paired_difference(student, baseline)
        return None if paired is None else paired.estimate or paired.mean

    def gap(self) -> Mean | None:
        """Share of the way from the baseline to the teacher, in percent."""
        shares = [share for run in self.finished if (share := number(run.metrics, "gap_closed")) is not None]
        return mean_from([100 * share for share in shares])

    def headline(self) -> Headline | None:
        """The number that the arm is judged by: the first that all its finished students have."""
        students = self.scores("student")
        shared = [headlines(scores) for scores in students]
        return next((each[task][0] for each in shared[:1] for task in each if all(task in one for one in shared)), None)

    def headline_path(self) -> tuple[str, ...] | None:
        students = self.scores("student")
        first = headlines(students[0]) if students else {}
        kept = self.headline()
        return next(((task, *each.path) for task, (each, _) in first.items() if each is kept), None)

    def _by_seed(self, role: str, path: Sequence[str]) -> dict[int, float]:
        values = {seed_of(run): number(run.metrics, role, *path) for run in self.finished}
        return {seed: value for seed, value in values.items() if value is not None}


def seed_of(run: RunFolder) -> int:
    seed = whole(run.metrics, "seed")
    return seed if seed is not None else whole(run.config, "seed") or 0


def arms_of(runs: Sequence[RunFolder]) -> tuple[Arm, ...]:
    """Runs by their configs without the seed, and by their step where they were cut short.

    A run whose seed an arm has already, or without config, is alone.
    """
    groups: list[tuple[str | None, list[RunFolder]]] = []
    for run in runs:
        key = _key(run)
        for other, members in groups:
            if key is not None and other == key and seed_of(run) not in map(seed_of, members):
                members.append(run)
                break
        else:
            groups.append((key, [run]))
    return _told_apart([Arm(tuple(sorted(members, key=seed_of))) for _, members in groups])


def _key(run: RunFolder) -> str | None:
    if not run.config:
        return None
    settings = {key: value for key, value in run.config.items() if key != "seed"}
    student = mapping(run.config, "student")
    if (name := string(student, "name")) is not None:  # of a chain: the student of an earlier run with the same seed
        settings["student"] = {**student, "name": _OF_RUN.sub("/student", name)}
    return json.dumps([settings, run.cut_short], sort_keys=True, default=str)


def _told_apart(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """The arms; those of equal names with so much of their paths as tells them apart."""
    names = Counter(arm.name for arm in arms)
    return tuple(
        replace(arm, place=_place(arm, [each for each in arms if each.name == arm.name]))
        if names[arm.name] > 1
        else arm
        for arm in arms
    )


def _place(arm: Arm, alike: Sequence[Arm]) -> str:
    paths = [each.first.path.parts for each in alike]
    depths = range(1, max(map(len, paths)))
    depth = next((n for n in depths if len({parts[-n:] for parts in paths}) == len(paths)), max(map(len, paths)))
    return "/".join(arm.first.path.parts[-depth:])


def mean_of(scores: Sequence[Mapping[str, Any]], *path: str) -> Mean | None:
    """A number of several runs' scores; None where a run lacks it."""
    values = [number(each, *path) for each in scores]
    return None if None in values else mean_from([value for value in values if value is not None])


def mean_from(values: Sequence[float]) -> Mean | None:
    summary = summarize(values)
    if summary is None:
        return None
    if not summary.deviation:  # equal values of all seeds are no evidence that the next would be equal
        return Mean(summary.mean, None, tuple(values))
    half = t_critical(summary.count - 1) * summary.deviation / summary.count**0.5
    return Mean(summary.mean, (summary.mean - half, summary.mean + half), tuple(values))


def curves_of(
    arm: Arm, log: Callable[[RunFolder], Sequence[Mapping[str, Any]]]
) -> dict[str, list[list[tuple[float, float]]]]:
    """Name of a logged number -> for each run its steps and values."""
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for run in arm.runs:
        of_run: dict[str, list[tuple[float, float]]] = {}
        for line in log(run):
            step = number(line, "step")
            if step is None:
                continue
            for key in line:
                value = number(line, key)
                if key != "step" and value is not None:
                    of_run.setdefault(key, []).append((step, value))
        for key, points in of_run.items():
            curves.setdefault(key, []).append(points)
    return curves


def listed(values: Any) -> list[str]:
    """The texts among the values of a sequence."""
    return [text for each in sequence(values) if (text := string(each)) is not None]

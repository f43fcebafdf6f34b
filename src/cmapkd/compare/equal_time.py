"""Equal time: rows whose steps fit into the time of one arm's, beside the rows of equal steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cmapkd.compare.clock import EqualTimeConfig
from cmapkd.compare.rows import PlannedRun, Row, config_digest, planned_run
from cmapkd.config import ConfigError, closest, counted
from cmapkd.run import RunConfig
from cmapkd.training import OptimConfig

EQUAL_STEPS, EQUAL_TIME = "equal steps", "equal time"
BUDGET = "budget"  # the coordinate that tells the two kinds of rows apart
WINDOW = 5  # steps between two lines of the log, whose mean is one measurement


@dataclass(frozen=True, slots=True)
class Seconds:
    """What a step of each row takes, as far as it is known."""

    config: EqualTimeConfig
    measured: Mapping[str, Mapping[str, Any]] | None  # by `key_of`, as in seconds.json; None: not yet, all are equal

    def of(self, label: str, arm: str | None, config: RunConfig) -> float:
        """Seconds a step of a row.

        Raises:
            ConfigError: they are neither given nor measured.
        """
        given = self.config.seconds
        if isinstance(given, dict):
            for name in (label, arm):
                if name in given:
                    return given[name]
            raise ConfigError(
                f"equal_time.seconds has none of arm {arm!r}{closest(str(arm), given)}: give seconds of every arm, or "
                "leave seconds out to have all measured"
            )
        if self.measured is None:
            return 1.0
        entry = self.measured.get(key_of(config, self.config))
        if entry is None:
            raise ConfigError(
                f"equal_time: there are no seconds a step of {label} in {given or 'the folder'}, which has "
                "them of other settings, measure_steps or warmup_steps. Leave equal_time.seconds out to measure here"
            )
        return float(entry["seconds"])

    @property
    def busy(self) -> list[str]:
        """Rows that were measured while other work held the processor up."""
        return [str(entry["row"]) for entry in (self.measured or {}).values() if entry.get("busy")]


def key_of(config: RunConfig, equal_time: EqualTimeConfig) -> str:
    """Digest of what the seconds a step of a config depend on: not its length, its seed and its rates."""
    short = measuring_config(config, steps=1).model_copy(update={"seed": 0})
    return config_digest({"run": short.plain(), "measure": [equal_time.measure_steps, equal_time.warmup_steps]})


def measuring_config(config: RunConfig, *, steps: int) -> RunConfig:
    """The short run by which a step of `config` is timed: without evaluations, checkpoints and further trackers."""
    changes = {"steps": steps, "epochs": None, "log_every": WINDOW, "evaluate_every": None, "checkpoint_every": steps}
    training = config.training.model_copy(update={**changes, "student": "last", "trackers": ()})
    data = config.data.model_copy(update={"val": None, "test": None})
    return config.model_copy(update={"training": training, "data": data, "optim": OptimConfig()})


def with_equal_time(rows: list[Row], unique: dict[str, PlannedRun], seconds: Seconds) -> tuple[list[Row], list[str]]:
    """Each row twice, at equal steps and at equal time, and what a reader must know of it.

    Args:
        unique: all runs by digest; the new ones are added.
    Raises:
        ConfigError: the arm that sets the time is not there, an arm's length is not in steps, or seconds are missing.
    """
    to, found, told = seconds.config.to, list[Row](), list[str]()
    clocks = {tuple(row.coordinates.items()): row for row in rows if row.coordinates.get("arm") == to}
    if not clocks:
        arms = [arm for arm in dict.fromkeys(row.coordinates.get("arm") for row in rows) if arm]
        raise ConfigError(
            f"equal_time.to: a table has no arm {to!r}{closest(to, arms)}; its arms: {', '.join(arms) or 'none'}"
        )
    for row in rows:
        clock = clocks[tuple((row.coordinates | {"arm": to}).items())]
        if row.config.training.steps is None or clock.config.training.steps is None:
            raise ConfigError(f"equal_time counts steps, and {row.label} has none: give it training.steps")
        own, theirs = (seconds.of(each.label, each.coordinates["arm"], each.config) for each in (row, clock))
        steps = max(1, round(clock.config.training.steps * theirs / own))
        told.append(f"{row.label} {own:.3g} s/step, {counted(steps, 'step')}")
        runs = {}
        for seed, run in row.runs.items():
            training = run.config.training.model_copy(update={"steps": steps})
            run = planned_run(run.config.model_copy(update={"training": training}), seed, (row.label, EQUAL_TIME))
            runs[seed] = unique.setdefault(run.digest, run)
        equal = replace(row, coordinates=row.coordinates | {BUDGET: EQUAL_STEPS}, label=f"{row.label}, {EQUAL_STEPS}")
        found.append(equal)
        found.append(Row(row.coordinates | {BUDGET: EQUAL_TIME}, f"{row.label}, {EQUAL_TIME}", runs))
    return found, list(_notes(seconds, to, told))


def _notes(seconds: Seconds, to: str, told: list[str]) -> Iterator[str]:
    given = isinstance(seconds.config.seconds, dict)
    yield (
        f"{EQUAL_TIME.capitalize()}: each arm has the steps that fit into the time of {to}, by its seconds a step "
        f"({'as given' if given else 'measured alone, after a warm-up'}); evaluations, checkpoints and the building of "
        f"caches are not counted: {'; '.join(told)}."
    )
    if seconds.busy:
        yield (
            f"THE MACHINE WAS BUSY while {'; '.join(seconds.busy)} was measured: steps at equal time may be wrong. "
            "Remove seconds.json from the folder to measure anew on an idle machine."
        )

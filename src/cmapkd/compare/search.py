"""The search of a tuning as it is carried out: trials that run, are read back, or are lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cmapkd.compare.config import ComparisonConfig
from cmapkd.compare.outcome import Outcome
from cmapkd.compare.plan import Plan, make_plan
from cmapkd.compare.resolve import Resolver
from cmapkd.compare.rows import PlannedRun
from cmapkd.compare.trials import Family, plan_trials
from cmapkd.compare.tune import Race, race, winners_of, write_tuning
from cmapkd.compare.tuning import TuningConfig
from cmapkd.compare.winners import Tuned, read_tuned
from cmapkd.config import ConfigError, RunStopped, printable
from cmapkd.config.disk import write_text
from cmapkd.results import RunResult, is_finished

DIVERGED = "diverged.json"  # in the folder of a trial whose loss was no number: it is not tried again
CarryOut = Callable[[PlannedRun, Iterable[PlannedRun], Mapping[str, Outcome]], Outcome]


class Trials:
    """Runs the trials of a tuning, or reads how they ended.

    Args:
        out: folder of the comparison.
        carry_out: makes one run; it is also given the runs before it and their outcomes. None: nothing is run.
    """

    def __init__(self, out: Path, console: Console | None = None, carry_out: CarryOut | None = None) -> None:
        self.out, self.console, self._carry_out = out, console, carry_out
        self.outcomes: dict[str, Outcome] = {}  # of this session
        self.begun: list[PlannedRun] = []

    def read(self, planned: PlannedRun) -> Outcome:
        """How a trial ended; `missing` where it has not."""
        if planned.digest in self.outcomes:
            return self.outcomes[planned.digest]
        folder = Plan.folder(planned, self.out)
        if is_finished(folder):
            return Outcome(folder, "finished", RunResult.read(folder).metrics)
        if (folder / DIVERGED).is_file():
            error = json.loads((folder / DIVERGED).read_text(encoding="utf-8"))["error"]
            return Outcome(folder, "failed", error=error, diverged=True)
        return Outcome(folder)

    def run(self, planned: PlannedRun) -> Outcome:
        """How a trial ended, after it has run if it had not; one that failed without diverging is tried again."""
        outcome = self.read(planned)
        if planned.digest in self.outcomes:
            return outcome
        self.say(f"[tuning, {len(self.begun) + 1}] {planned.name}: {_doing(outcome)}")
        if not outcome.diverged:
            assert self._carry_out is not None
            outcome = self._carry_out(planned, self.begun, self.outcomes)
            if outcome.diverged:
                write_text(outcome.folder / DIVERGED, json.dumps({"error": outcome.error}) + "\n")
        self.begun.append(planned)
        self.outcomes[planned.digest] = outcome
        if outcome.error is not None:
            self.say(f"lost: {outcome.error}")
        return outcome

    def say(self, line: str) -> None:
        if self.console is not None:
            self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _doing(outcome: Outcome) -> str:
    if outcome.status != "missing":
        return "read back"
    return "going on" if (outcome.folder / "config.yaml").is_file() else "starting"


def search(tuning: TuningConfig, planned: Sequence[Family], trials: Trials, only: Sequence[str] = ()) -> Tuned | None:
    """Carries out the races of all families, or of `only` these; the files are written after each trial.

    Returns:
        The winners; None while a family that was left out has none.
    Raises:
        RunStopped: all trials of a family were lost; the other families are done first.
    """

    def races() -> list[Race]:
        return [race(family, tuning.metric, trials.read) for family in planned]

    def attempt(run: PlannedRun) -> Outcome:
        known = trials.read(run).status == "finished"
        outcome = trials.run(run)
        if not known:
            write_tuning(trials.out, tuning, races())
        return outcome

    for family in planned:
        if not only or family.name in only:
            won = race(family, tuning.metric, attempt).winner
            if won is not None:
                chosen = ", ".join(f"{key}={value}" for key, value in won.trial.settings.items()) or "as declared"
                trials.say(f"tuning, {family.name}: trial {won.trial.number} is best with {won.mean:.4g}: {chosen}")
    ended = races()
    for each in ended:
        if each.winner is None and each.over:
            raise RunStopped(
                f"family {each.family.name}: every trial of its last round diverged or failed, the first with: "
                f"{each.rounds[-1][0].error}. tuning.csv lists them; give the family another space"
            )
    return write_tuning(trials.out, tuning, ended)


def read_tuning(comparison: ComparisonConfig, out: Path | None) -> tuple[list[Race], Tuned | None]:
    """How far a comparison's tuning is, by what is in its folder, and its winners, if they are known or given.

    Raises:
        ConfigError: something in the tuning is wrong.
    """
    tuning = comparison.tuning
    if tuning is None:
        return [], None
    if tuning.winners is not None:
        tuned = read_tuned(Path(tuning.winners), asked=tuning)
        check_winners(tuned, comparison)
        return [], tuned
    trials = Trials(out or Path(os.devnull))
    races = [race(family, tuning.metric, trials.read) for family in plan_trials(comparison, Resolver.of(comparison))]
    return races, winners_of(tuning, races)


def check_winners(tuned: Tuned, comparison: ComparisonConfig) -> None:
    """Refuses winners of which the comparison has no arm, or that were chosen with its own seeds or data.

    Raises:
        ConfigError: says which, and what to do.
    """
    arms = [arm for family in tuned.families.values() for arm in family.arms]
    if not any(arm in comparison.arms for arm in arms):
        raise ConfigError(
            f"tuning.winners are of {', '.join(arms)}, and this comparison has none of these arms; its arms: "
            f"{', '.join(comparison.arms) or 'none'}"
        )
    shared = sorted({*tuned.tuning.seeds} & {*comparison.seeds})
    if shared:
        raise ConfigError(
            f"tuning.winners were chosen with seed {', '.join(map(str, shared))}, which this comparison has too: take "
            "other seeds"
        )
    rows = [row for table in make_plan(comparison, tuned).tables for row in table.rows]
    runs = [run for row in rows if row.coordinates.get("arm") in arms for run in row.runs.values()]
    if any(run.config.data.final == tuned.measured_on for run in runs):
        raise ConfigError(
            f"tuning.winners were chosen on {tuned.measured_on}, which this comparison would be measured on: give "
            "data.test another source"
        )

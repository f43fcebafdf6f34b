"""Successive halving of a family's trials, the files that it leaves, and its winners."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cmapkd.compare.metric import lookup, lower_is_better
from cmapkd.compare.outcome import Outcome
from cmapkd.compare.rows import PlannedRun
from cmapkd.compare.space import edges
from cmapkd.compare.trials import Family, Trial
from cmapkd.compare.tuning import TuningConfig
from cmapkd.compare.winners import Round, Tuned, TunedFamily, write_tuned
from cmapkd.config import ConfigError, closest, counted
from cmapkd.config.disk import write_text
from cmapkd.config.leaves import leaves
from cmapkd.provenance import describe_environment

Attempt = Callable[[PlannedRun], Outcome]


@dataclass(frozen=True, slots=True)
class Score:
    """What a trial reached in one round."""

    trial: Trial
    values: dict[int, float]  # by seed
    mean: float | None  # None: it was lost, or is not finished
    status: str  # finished, diverged, failed or missing
    error: str | None
    kept: bool = False  # went on to the next round, or won the last


@dataclass(frozen=True, slots=True)
class Race:
    """A family's rounds, as far as they are known."""

    family: Family
    rounds: tuple[tuple[Score, ...], ...]
    winner: Score | None

    @property
    def over(self) -> bool:
        """Whether no trial is missing: with no winner then, all of them were lost."""
        last = self.rounds[-1]
        lost = all(score.mean is None for score in last)
        known = all(score.status != "missing" for score in last)
        return known and (lost or len(self.rounds) == len(self.family.keeps))


def race(family: Family, metric: str, attempt: Attempt) -> Race:
    """Lets every trial of a round run, and the best of them go on to the next, longer one.

    A trial that diverges or fails loses. Of equal scores the one of the lower number goes on, so that settings as
    declared are kept where none is better.

    Args:
        attempt: the outcome of one run. It may be `missing`, as it is where nothing is run but only read; the race then
            ends with its round.
    Raises:
        ConfigError: a finished trial has no such metric.
    """
    sign = 1.0 if lower_is_better(metric) else -1.0
    entering: Iterable[Trial] = family.trials
    rounds: list[tuple[Score, ...]] = []
    for number, keep in enumerate(family.keeps):
        scores = [_score(trial, trial.runs[number], metric, attempt) for trial in entering]
        if any(score.status == "missing" for score in scores):
            return Race(family, (*rounds, tuple(scores)), None)
        able = sorted((sign * score.mean, score.trial.number) for score in scores if score.mean is not None)
        best = {trial for _, trial in able[:keep]}
        rounds.append(tuple(_marked(score, score.trial.number in best) for score in scores))
        entering = [score.trial for score in scores if score.trial.number in best]
        if not best:
            break
    winner = next((score for score in rounds[-1] if score.kept), None)
    return Race(family, tuple(rounds), winner)


def _marked(score: Score, kept: bool) -> Score:
    return Score(score.trial, score.values, score.mean, score.status, score.error, kept)


def _score(trial: Trial, runs: dict[int, PlannedRun], metric: str, attempt: Attempt) -> Score:
    values: dict[int, float] = {}
    for seed, run in runs.items():
        outcome = attempt(run)
        if outcome.status != "finished":  # one seed lost is the trial lost, so the others need not run
            status = "diverged" if outcome.diverged else outcome.status
            return Score(trial, values, None, status, outcome.error)
        value = lookup(outcome.metrics["student"], metric)
        if value is None:
            known = {path for path, _ in leaves(outcome.metrics["student"])}
            raise ConfigError(f"tuning.metric: {run.name} has no score {metric}{closest(metric, known)}")
        values[seed] = value
    return Score(trial, values, fmean(values.values()), "finished", None)


# ------------------------------------------------------------------------------------------------ what it leaves


def write_tuning(out: Path, tuning: TuningConfig, races: Sequence[Race]) -> Tuned | None:
    """Writes tuning.json and tuning.csv of all trials; and tuned.yaml, once every family has a winner.

    Returns:
        The content of tuned.yaml; None while it is not written.
    """
    families = {each.family.name: _record(each) for each in races}
    records = {"tuning": tuning.model_dump(mode="json"), "families": families, "environment": describe_environment()}
    write_text(out / "tuning.json", json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    write_text(out / "tuning.csv", _csv(races))
    tuned = winners_of(tuning, races)
    if tuned is not None:
        write_tuned(out / "tuned.yaml", tuned)
    return tuned


def winners_of(tuning: TuningConfig, races: Sequence[Race]) -> Tuned | None:
    """The winners of all families; None while one has none."""
    if not all(each.winner for each in races):
        return None
    measured_on = next(iter(races[0].family.trials[0].runs[0].values())).config.data.val
    return Tuned(
        tuning=tuning,
        measured_on=str(measured_on),
        families={each.family.name: _tuned(each) for each in races},
        environment=describe_environment(),
    )


def _tuned(each: Race) -> TunedFamily:
    family, won = each.family, each.winner
    assert won is not None
    assert won.mean is not None
    rounds = zip(family.lengths, each.rounds, family.keeps, strict=True)
    lost = {score.trial.number for scores in each.rounds for score in scores if score.mean is None}
    return TunedFamily(
        arms=family.arms,
        settings=won.trial.settings,
        trial=won.trial.number,
        rounds=tuple(Round(length=length, trials=len(scores), keep=keep) for length, scores, keep in rounds),
        score=won.mean,
        lost=tuple(sorted(lost)),
        edge=tuple(edges(family.space, won.trial.values)),
        config=next(iter(won.trial.runs[-1].values())).config.plain(),
    )


def _record(each: Race) -> dict[str, Any]:
    family = each.family
    trials = []
    for trial in family.trials:
        rounds = []
        for length, scores, place in zip(family.lengths, each.rounds, range(len(each.rounds)), strict=False):
            for score in scores:
                if score.trial is trial:
                    runs = {seed: run.name for seed, run in trial.runs[place].items()}
                    rounds.append(
                        {"length": length, "status": score.status, "score": score.mean, "by_seed": score.values}
                        | {"kept": score.kept, "error": score.error, "runs": runs}
                    )
        trials.append({"trial": trial.number, "settings": trial.settings, "values": trial.values, "rounds": rounds})
    winner = None if each.winner is None else each.winner.trial.number
    return {"arms": family.arms, "lengths": family.lengths, "keeps": family.keeps, "winner": winner, "trials": trials}


def _csv(races: Sequence[Race]) -> str:
    """One row for each trial in each round."""
    keys = list(dict.fromkeys(key for each in races for key in each.family.space))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["family", "trial", "round", "length", "steps", "status", "score", "kept", *keys, "run", "error"])
    for each in races:
        for place, scores in enumerate(each.rounds):
            for score in scores:
                trial = score.trial
                names = " ".join(run.name for run in trial.runs[place].values())
                family, values = each.family, [trial.values.get(key) for key in keys]
                head = [family.name, trial.number, place + 1, family.lengths[place], family.steps[place]]
                writer.writerow([*head, score.status, score.mean, score.kept, *values, names, score.error])
    return text.getvalue()


def budget_in_words(family: Family) -> str:
    """What a family's trials take: `16 of 400 steps, 4 of 2,400 steps: 16,000 steps`."""
    seeds = len(family.trials[0].runs[0])
    sizes = family.entering()
    parts = [f"{size} of {length}" for size, length in zip(sizes, family.lengths, strict=True)]
    steps = [size * length * seeds for size, length in zip(sizes, family.steps, strict=True) if length is not None]
    times = f", each with {counted(seeds, 'seed')}" * (seeds > 1)
    return ", ".join(parts) + times + (f": {counted(sum(steps), 'step')}" if len(steps) == len(parts) else "")

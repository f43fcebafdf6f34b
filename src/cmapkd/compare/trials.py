"""Which trials a comparison's tuning needs: every family's settings, and each trial's runs in every round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmapkd.compare.config import ComparisonConfig
from cmapkd.compare.resolve import Resolver, layers_of, settings_of
from cmapkd.compare.rows import PlannedRun, planned_run
from cmapkd.compare.space import Space, draw
from cmapkd.compare.tuning import RungConfig, TuningConfig
from cmapkd.config import ConfigError, closest
from cmapkd.data.open import split_of
from cmapkd.evaluation.tasks import TASKS
from cmapkd.methods import METHODS
from cmapkd.run import RunConfig


@dataclass(frozen=True, slots=True)
class Trial:
    """One set of values: the arm as declared (number 0), or drawn from the family's space."""

    number: int
    settings: dict[str, Any]  # dotted key -> value set over the arm's own; none for the arm as declared
    values: dict[str, Any]  # dotted key of the space -> the value in this trial
    runs: tuple[dict[int, PlannedRun], ...]  # for every round, by seed


@dataclass(frozen=True, slots=True)
class Family:
    """All trials of a family, and the rounds that choose among them."""

    name: str
    arms: tuple[str, ...]
    space: Space
    lengths: tuple[str, ...]  # of a trial in each round, in words
    steps: tuple[int | None, ...]  # the same; None where epochs say how long the arm trains
    keeps: tuple[int, ...]
    trials: tuple[Trial, ...]

    def entering(self) -> list[int]:
        """How many trials each round has, if none is lost."""
        sizes = [len(self.trials)]
        for keep in self.keeps[:-1]:
            sizes.append(min(keep, sizes[-1]))
        return sizes


def plan_trials(comparison: ComparisonConfig, resolver: Resolver) -> tuple[Family, ...]:
    """Resolves every trial before the first one runs, so that a mistake shows at once.

    Raises:
        ConfigError: lists the problems of all families.
    """
    assert comparison.tuning is not None
    families = []
    problems: dict[str, list[str]] = {}
    for name in comparison.tuning.families:
        try:
            families.append(_family(comparison, comparison.tuning, name, resolver))
        except ConfigError as error:
            for line in error.problems or (str(error),):
                problems.setdefault(line, []).append(name)
    if problems:
        lines = [f"{'; '.join(names)}: {line}" for line, names in problems.items()]
        head = f"{len(lines)} problem{'s'[: len(lines) != 1]} in the tuning of this comparison:\n  "
        raise ConfigError(head + "\n  ".join(lines), tuple(lines))
    return tuple(families)


def _check_metric(config: RunConfig, metric: str) -> None:
    """Refuses to judge trials by a task that these students cannot be measured by.

    Raises:
        ConfigError: names the headline of a task that measures them.
    """
    task = TASKS.own.get(metric.partition(".")[0])
    reads = METHODS[config.method.name].reads
    if task is not None and issubclass(reads, task.reads):
        return
    able = [f"{name}.{'.'.join(each.headline.path)}" for name, each in TASKS.own.items()
            if each.headline is not None and issubclass(reads, each.reads)]  # fmt: skip
    if task is None and metric.partition(".")[0] in TASKS:
        return  # of an installed package
    if task is None:
        raise ConfigError(f"tuning.metric is {metric}, which no task measures{closest(metric, able)}")
    raise ConfigError(
        f"tuning.metric is {metric}, of a model that {task.reads.does}, and method {config.method.name} trains one "
        f"that {reads.does}: set tuning.metric to {' or '.join(able)}"
    )


def _family(comparison: ComparisonConfig, tuning: TuningConfig, name: str, resolver: Resolver) -> Family:
    arms, space = tuning.arms_of(name), tuning.space_of(name)
    layers = [settings_of(comparison.arms[arms[0]], f"arm {arms[0]!r}")]
    layers += layers_of({axis: comparison.axes[axis][label] for axis, label in tuning.at.items()}, "axes")
    declared, _ = resolver.resolve(layers, seed=tuning.seeds[0], where=name)
    folds = [layers_of(comparison.folds.get(seed, {}), f"folds, seed {seed}") for seed in comparison.seeds]
    finals = [resolver.resolve([*layers, *fold], seed=tuning.seeds[0], where=name)[0].data.final for fold in folds]
    _check_data(declared, finals, comparison.evaluate)
    _check_metric(declared, tuning.metric)
    for key in space:
        _check_key(key, declared)
    number = tuning.trials_of(name)
    own = {key: _value_at(declared.plain(), key) for key in space}
    drawn = draw(space, number - 1, seed=f"{tuning.draw} {name}", known=[own])
    rounds = tuning.rounds(1 + len(drawn))
    lengths = [_length(declared, each) for each in rounds]
    trials = []
    for place, settings in enumerate([{}, *drawn]):
        over = layers_of(settings, f"space of {name!r}")
        runs = []
        for length in lengths:
            last = {"training": length, "data": {"test": None}}
            config, _ = resolver.resolve([*layers, *over, last], seed=tuning.seeds[0], where=name)
            parts = ("tuning", name, f"trial{place:02}", _in_words(length).replace(" ", ""))
            runs.append({seed: planned_run(config, seed, parts) for seed in tuning.seeds})
        trials.append(Trial(place, settings, settings or own, tuple(runs)))
    for arm in arms[1:]:  # which get the winner's settings, too
        own_layers = [settings_of(comparison.arms[arm], f"arm {arm!r}"), *layers[1:]]
        resolver.resolve([*own_layers, *layers_of(trials[-1].settings, name)], seed=tuning.seeds[0], where=arm)
    return Family(
        name,
        arms,
        space,
        tuple(_in_words(length) for length in lengths),
        tuple(length["steps"] for length in lengths),
        tuple(each.keep for each in rounds),
        tuple(trials),
    )


def _check_data(declared: RunConfig, finals: Sequence[str | None], evaluate: Mapping[str, str]) -> None:
    """Trials are judged on validation data, and the comparison on others.

    Args:
        finals: what the runs of the comparison are measured on.
        evaluate: further test data of the comparison.
    Raises:
        ConfigError: there are none, they are a test split, or the comparison ends on them too.
    """
    val = declared.data.val
    if val is None:
        raise ConfigError("tuning chooses on data.val, and there is none: add data.val=SOURCE")
    if split_of(val, default="val") == "test":
        raise ConfigError(f"tuning chooses on data.val, which is a test split: {val}. Choose on another one")
    if val in finals:
        raise ConfigError(
            f"tuning chooses on data.val, {val}, and the comparison would be measured on the same data, which flatters "
            "the arms that were tuned: add data.test=SOURCE"
        )
    for name, source in evaluate.items():
        if source == val:
            raise ConfigError(f"tuning chooses on data.val, {val}, which is evaluate.{name} too: take other data there")


def _check_key(key: str, declared: RunConfig) -> None:
    """Refuses a key of a space that the config has not; a value that does not fit is found when it is set."""
    section, _, name = key.rpartition(".")
    below: Any = declared
    for part in section.split(".") if section else ():
        below = below.get(part) if isinstance(below, Mapping) else getattr(below, part, None)
    fields = getattr(type(below), "model_fields", None)
    if fields is not None and name not in fields:
        raise ConfigError(f"space: {key}: unknown key{closest(name, fields)}. Known here: {', '.join(sorted(fields))}.")


def _value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _length(declared: RunConfig, each: RungConfig) -> dict[str, Any]:
    """The length of a round as settings of `training`.

    Raises:
        ConfigError: the stages say how long the arm trains.
    """
    training = declared.training
    if training.steps is None and training.epochs is None:
        raise ConfigError("the stages state their own lengths, which trials cannot shorten: give them shares instead")
    if each.steps is not None:
        return {"steps": each.steps, "epochs": None}
    assert each.share is not None
    if training.steps is not None:
        return {"steps": max(1, round(each.share * training.steps)), "epochs": None}
    assert training.epochs is not None
    return {"steps": None, "epochs": each.share * training.epochs}


def _in_words(length: dict[str, Any]) -> str:
    if length["steps"] is None:
        return f"{length['epochs']:g} epochs"
    return f"{length['steps']:,} step{'s'[: length['steps'] != 1]}"

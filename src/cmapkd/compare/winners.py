"""What a tuning found, as a file that another comparison can take (`tuned.yaml`), and what the tables say of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from cmapkd.compare.tuning import TuningConfig
from cmapkd.config import Config, ConfigError, fixed_differences
from cmapkd.config.disk import write_text
from cmapkd.run import RunConfig

_HEAD = "# What tuning chose. Another comparison takes it with tuning: {winners: FILE}.\n"
_OF_ITS_OWN = ("seed", "data.test", "training.steps", "training.epochs")  # of a trial, or of a row of the table


class Round(Config):
    """What one round of halving was."""

    length: str = Field(description="Of each trial, in words: 400 steps.")
    trials: int = Field(description="Settings tried.")
    keep: int = Field(description="The best so many went on.")


class TunedFamily(Config):
    """The best settings of one family, and what they cost."""

    arms: tuple[str, ...] = Field(description="Arms that get the settings.")
    settings: dict[str, Any] = Field(description="Dotted key -> value, set over the arms' own; none: as declared.")
    trial: int = Field(description="Number of the trial; 0 is the arm as declared.")
    rounds: tuple[Round, ...] = Field(description="What was tried.")
    score: float = Field(description="Mean over the seeds, in the last round.")
    lost: tuple[int, ...] = Field((), description="Trials that diverged or failed.")
    edge: tuple[str, ...] = Field((), description="Settings at the edge of the space.")
    config: dict[str, Any] = Field(description="The winner's run in the last round, whole.")


class Tuned(Config):
    """The content of a tuned.yaml."""

    tuning: TuningConfig = Field(description="The budget and the spaces.")
    measured_on: str = Field(description="Source of the metric.")
    families: dict[str, TunedFamily] = Field(description="Name -> its best settings.")
    environment: dict[str, Any] = Field(description="Versions, hardware and commit of the trials.")

    def settings_of(self, arm: str) -> dict[str, Any]:
        """Dotted settings that the arm gets; none where it is not tuned."""
        return next((family.settings for family in self.families.values() if arm in family.arms), {})

    def notes(self, rows: Mapping[str, Iterable[RunConfig]]) -> Iterator[str]:
        """What a reader of a table must know of the tuning of its arms.

        Args:
            rows: arm of the table -> the configs of its rows.
        """
        here = {name: family for name, family in self.families.items() if any(arm in rows for arm in family.arms)}
        seeds = ", ".join(map(str, self.tuning.seeds))
        yield (
            f"Tuned on {self.measured_on} by {self.tuning.metric}, with seed{'s'[: len(self.tuning.seeds) != 1]} "
            f"{seeds}, before the comparison:"
        )
        for name, family in here.items():
            arms = " and ".join(arm for arm in family.arms if arm in rows)
            chosen = ", ".join(f"{key} {_shown(value)}" for key, value in family.settings.items())
            lost = f"; {len(family.lost)} diverged or failed" * bool(family.lost)
            best = f"best: {chosen}" if chosen else "best: as declared"
            yield f"{arms}: {rounds_in_words(family.rounds)}{lost}; {best}."
            if family.edge:
                yield (
                    f"{name}: its best settings lie at the edge of what was searched, so better ones may lie beyond: "
                    f"{', '.join(family.edge)}."
                )
        budgets = {name: rounds_in_words(family.rounds) for name, family in here.items()}
        if len({*budgets.values()}) > 1:
            told = "; ".join(f"{name} {budget}" for name, budget in budgets.items())
            yield f"The budgets of tuning are not equal: {told}."
        untuned = [arm for arm in rows if not any(arm in family.arms for family in here.values())]
        if untuned:
            yield f"Not tuned, with settings as declared: {'; '.join(untuned)}."
        yield from _far_shorter(here, rows)
        yield from _elsewhere(here, rows)


def _far_shorter(families: Mapping[str, TunedFamily], rows: Mapping[str, Iterable[RunConfig]]) -> Iterator[str]:
    """Which families' longest trials are less than half as long as their runs: early winners may lose later."""
    told: dict[str, list[str]] = {}
    for name, family in families.items():
        for unit in ("steps", "epochs"):
            tried = family.config["training"].get(unit)
            runs = [length for config in rows.get(family.arms[0], ()) if (length := getattr(config.training, unit))]
            if tried and runs and max(runs) > 2 * tried:
                told.setdefault(f"{tried:g} {unit}, and these runs up to {max(runs):g}", []).append(name)
    for lengths, names in told.items():
        yield (
            f"The longest trials of {'; '.join(names)} have {lengths}. Settings that are best so early may not be the "
            "best at the end: a last round of at least half the runs' length is safer."
        )


def _elsewhere(families: Mapping[str, TunedFamily], rows: Mapping[str, Iterable[RunConfig]]) -> Iterator[str]:
    """In what the rows differ from the runs that their settings were chosen with."""
    differing: dict[str, None] = {}
    for family in families.values():
        own = (*_OF_ITS_OWN, *family.settings)
        for config in rows.get(family.arms[0], ()):
            keys = fixed_differences(config, family.config, config.plain())
            differing |= dict.fromkeys(key for key in keys if not key.startswith(own))
    if differing:
        yield f"The trials had other values than some of these rows: {', '.join(differing)}."


def rounds_in_words(rounds: Iterable[Round]) -> str:
    """`16 trials of 400 steps, 4 of 2,400 steps`."""
    first, *more = rounds
    trials = f"{first.trials} trial{'s'[: first.trials != 1]} of {first.length}"
    return ", ".join([trials, *(f"{each.trials} of {each.length}" for each in more)])


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def write_tuned(path: Path, tuned: Tuned) -> None:
    write_text(path, _HEAD + yaml.safe_dump(tuned.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def read_tuned(path: Path, *, asked: TuningConfig | None = None) -> Tuned:
    """The winners of an earlier tuning.

    Args:
        asked: what the comparison says of its tuning; where it names families, the file must be of that tuning.
    Raises:
        ConfigError: the file is not there, no tuned.yaml, or of another tuning.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"tuning.winners: there is no {path}. A tuning leaves tuned.yaml in its folder: name that file"
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"tuning.winners: {path} cannot be read: {error}") from None
    tuned = Tuned.from_mapping(values, where=f"tuning.winners {path}")
    if asked is not None and asked.families:
        mine, theirs = (each.model_dump(mode="json", exclude={"winners"}) for each in (asked, tuned.tuning))
        differing = [key for key in mine if mine[key] != theirs[key]]
        if differing:
            raise ConfigError(
                f"tuning.winners: {path} is of another tuning, which differs in {', '.join(differing)}. Give winners "
                "alone, or leave winners out to tune anew"
            )
    return tuned

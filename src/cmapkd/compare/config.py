"""What a comparison is made of: a base recipe, arms, axes, seeds and tables, from a file or the command line."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from cmapkd.compare.arms import Arm, labelled_axes, later_tasks, parse_arm, parse_axis, plain_arms
from cmapkd.compare.clock import EqualTimeConfig
from cmapkd.compare.declared import ContrastConfig
from cmapkd.compare.tuning import TuningConfig
from cmapkd.config import Config, ConfigError, closest, list_recipes
from cmapkd.config.load import yaml_problem
from cmapkd.evaluation.tasks import TASKS

_SCORES = ("params", "params_borrowed", "bad_samples")  # names that a student's scores have already, besides tasks
_OF_FOLDS = ("data", "teacher", "student")  # sections that a fold may set


class _ArmsAndAxes(Config):
    """How arms and axes may be written, wherever they stand."""

    @field_validator("arms", mode="before", check_fields=False)
    @classmethod
    def _plain_arms(cls, value: Any) -> Any:
        return plain_arms(value) if isinstance(value, dict) else value

    @field_validator("axes", mode="before", check_fields=False)
    @classmethod
    def _labelled_axes(cls, value: Any) -> Any:
        return labelled_axes(value)


class TableConfig(_ArmsAndAxes):
    """One table of several that share runs. What it leaves out, it takes from the comparison."""

    arms: dict[str, Arm] | tuple[str, ...] | None = Field(
        None, description="Arms of this table, or names of the comparison's; none: all of the comparison's."
    )
    axes: dict[str, dict[str, Any]] | None = Field(
        None, description="Axes of this table; none: the comparison's; {}: none."
    )
    reference: str | None = Field(None, description="Differences are taken to this arm or axis value.")
    gap_from: str | None = Field(None, description="Where the gap to the teacher begins: an arm or axis value.")
    metrics: tuple[str, ...] | None = Field(None, description="Dotted paths in the student's scores.")
    plateau: float | None = Field(None, description="As in the comparison, for this table's first metric.")
    contrasts: tuple[ContrastConfig, ...] | None = Field(
        None, description="Differences that are tested; none: those of the comparison whose rows the table has."
    )


class ComparisonConfig(_ArmsAndAxes):
    """Everything a comparison depends on; `comparison.yaml` of its folder holds it resolved."""

    base: str = Field(description="Recipe that every arm starts from: a packaged name or a YAML file.")
    overrides: tuple[str, ...] = Field((), description="key=value settings of all arms; arms and axes go over them.")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Each arm is run once with each.")
    folds: dict[int, dict[str, Any]] = Field(
        default_factory=dict,
        description="Seed -> settings of data, teacher and student that its runs take, over all others: "
        "cross-validation.",
    )
    arms: dict[str, Arm] = Field(default_factory=dict, description="Name -> settings, a mapping or a key=value list.")
    axes: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Key -> values, as a list or as label: value; the product with the arms."
    )
    tables: dict[str, TableConfig] = Field(
        default_factory=dict, description="Title -> table; none: one table of all arms. Equal runs are shared."
    )
    reference: str | None = Field(
        None,
        description="Differences are taken to this arm or axis value; none: the one of a method that uses no teacher.",
    )
    gap_from: str | None = Field(
        None,
        description="Where the gap to the teacher begins; none: the arm or axis value of a method that uses "
        "no teacher.",
    )
    metrics: tuple[str, ...] | None = Field(
        None,
        description="Dotted paths in the student's scores; none: the first number of each task that was "
        "measured, such as mean R@1, zero-shot top-1 or answering overall.",
    )
    gap_rising: float | None = Field(
        1.0,
        ge=0,
        description="Points by which the row where the gap begins may still rise in validation over the last quarter "
        "of its steps; beyond, the share of the gap is withheld. none: not checked.",
    )
    plateau: float | None = Field(
        None, description="A seed is off the plateau where its score on a table's first metric is above this."
    )
    contrasts: tuple[ContrastConfig, ...] = Field(
        (), description="Differences that are tested, with Holm's correction over all contrasts of the file."
    )
    evaluate: dict[str, str] = Field(
        default_factory=dict, description="Name -> source of further test data; metrics there are NAME.path."
    )
    tasks: tuple[str, ...] = Field(
        (),
        description="Names of evaluate, as arms with `then` learn them: for the table of Transfer, Average and Last.",
    )
    task_metric: str = Field("zero_shot.top1", description="Dotted path in the scores on each of the tasks.")
    tuning: TuningConfig | None = Field(
        None, description="How settings are chosen before the arms are compared: equal trials for every family."
    )
    equal_time: EqualTimeConfig | None = Field(
        None, description="Each arm stands beside itself with the steps that fit into the time of one of them."
    )

    @field_validator("seeds")
    @classmethod
    def _seeds_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or min(value) < 0:
            raise ValueError(f"seeds are whole numbers >= 0, each once; got {', '.join(map(str, value))}")
        return value

    @field_validator("folds")
    @classmethod
    def _folds_change_data(cls, value: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        for seed, settings in value.items():
            for key in settings:
                if key.partition(".")[0] not in _OF_FOLDS:
                    raise ValueError(
                        f"the fold of seed {seed} sets {key}: a fold sets {', '.join(_OF_FOLDS)} alone. What tells "
                        "arms apart belongs into arms"
                    )
        return value

    @field_validator("evaluate")
    @classmethod
    def _names_of_their_own(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if "." in name or name in TASKS or name in _SCORES:
                raise ValueError(
                    f"{name!r} cannot name a test set: metrics are found by dotted paths, where tasks "
                    f"({', '.join(TASKS)}) and {', '.join(_SCORES)} are the student's own scores. Choose another name, "
                    "without a dot"
                )
        return value

    @model_validator(mode="after")
    def _a_fold_for_each_seed(self) -> Self:
        missing = [seed for seed in self.seeds if seed not in self.folds]
        if self.folds and missing:
            raise ValueError(
                f"folds has no settings for seed {', '.join(map(str, missing))}: give every seed a fold. Seeds may "
                "share the settings of one"
            )
        return self

    @model_validator(mode="after")
    def _something_to_compare(self) -> Self:
        if not (self.arms or self.axes or self.tables):
            raise ValueError("there is nothing to compare: give arms, axes or tables")
        for title, table in self.tables.items():
            if isinstance(table.arms, tuple):
                for name in table.arms:
                    if name not in self.arms:
                        raise ValueError(
                            f"table {title!r}: there is no arm {name!r}{closest(name, self.arms)}; the comparison's "
                            f"arms: {', '.join(self.arms) or 'none'}"
                        )
            if not (self.table_arms(title) or self.table_axes(title)):
                raise ValueError(f"table {title!r}: there is nothing to compare, give arms or axes")
        return self

    @model_validator(mode="after")
    def _tasks_of_chains(self) -> Self:
        for name in self.tasks:
            if name not in self.evaluate:
                raise ValueError(f"tasks: {name!r} is no name in evaluate{closest(name, self.evaluate)}")
        arms = {title: self.table_arms(title) for title in self.tables} | {"": self.arms}
        chained = {name: len(later_tasks(arm)) for each in arms.values() for name, arm in each.items()}
        for name, later in chained.items():
            if later and self.tasks and later + 1 != len(self.tasks):
                raise ValueError(
                    f"arm {name!r} is a chain of {later + 1} runs, and tasks names {len(self.tasks)}: name one for each"
                )
            if later and (self.tuning is not None or self.equal_time is not None or self.folds):
                raise ValueError(f"arm {name!r} has `then`: tuning, equal_time and folds know no chains yet")
        if self.tasks and not any(chained.values()):
            raise ValueError("tasks are named, and no arm has `then`: give an arm the settings of its later runs")
        return self

    @model_validator(mode="after")
    def _tuning_of_what_is_there(self) -> Self:
        tuning = self.tuning
        if tuning is None:
            return self
        shared = sorted({*tuning.seeds} & {*self.seeds})
        if shared:
            raise ValueError(
                f"tuning.seeds {', '.join(map(str, shared))} are seeds of the comparison too: what was chosen with a "
                "seed looks better with it. Give the trials seeds of their own"
            )
        for family in tuning.families:
            for arm in tuning.arms_of(family):
                if arm not in self.arms:
                    raise ValueError(
                        f"tuning.families.{family}: there is no arm {arm!r}{closest(arm, self.arms)}; the comparison's "
                        f"arms: {', '.join(self.arms) or 'none'}"
                    )
        if tuning.families:
            self._check_point_of_tuning(tuning)
        return self

    def _check_point_of_tuning(self, tuning: TuningConfig) -> None:
        """Where trials are run must be said for every axis, and be there."""
        for axis, label in tuning.at.items():
            if axis not in self.axes:
                raise ValueError(f"tuning.at: there is no axis {axis!r}{closest(axis, self.axes)}")
            if label not in self.axes[axis]:
                known = ", ".join(self.axes[axis])
                raise ValueError(f"tuning.at: axis {axis} has no value {label!r}; known: {known}")
        in_steps = not isinstance(tuning.halving, int) and tuning.halving[0].steps is not None
        for axis, values in self.axes.items():
            if axis not in tuning.at and not (in_steps and axis == "training.steps"):
                raise ValueError(
                    f"tuning is done at one value of each axis: name it, at: {{{axis}: {next(iter(values))}}}"
                )
            for family in tuning.families:
                for key in tuning.space_of(family):
                    if key == axis or key.startswith(f"{axis}.") or axis.startswith(f"{key}."):
                        raise ValueError(f"tuning.families.{family} searches {key}, which axis {axis} sets: drop one")

    def table_arms(self, title: str) -> dict[str, Arm]:
        """The arms of a table, with their settings."""
        arms = self.tables[title].arms
        if arms is None:
            return self.arms
        return arms if isinstance(arms, dict) else {name: self.arms[name] for name in arms}

    def table_axes(self, title: str) -> dict[str, dict[str, Any]]:
        """The axes of a table: key -> label -> value."""
        axes = self.tables[title].axes
        return self.axes if axes is None else axes

    def plateau_of(self, title: str) -> float | None:
        """The plateau of a table."""
        table = self.tables.get(title)
        return self.plateau if table is None or table.plateau is None else table.plateau

    def plain(self) -> dict[str, Any]:
        """As plain data: a comparison file that gives the same runs."""
        return self.model_dump(mode="json")


def list_comparisons() -> list[str]:
    """Names of the packaged comparisons."""
    folder = resources.files("cmapkd.recipes") / "compare"
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_comparison(
    source: str | Path | None = None,
    *,
    packaged: str | None = None,
    overrides: Sequence[str] = (),
    arms: Sequence[str] = (),
    axes: Sequence[str] = (),
    seeds: Sequence[int] = (),
    reference: str | None = None,
) -> ComparisonConfig:
    """A comparison from a file or a recipe, with what the command line adds.

    Args:
        source: a comparison file, or a recipe (name or file) that becomes the base; with `packaged`, a recipe that
            takes the place of its base.
        packaged: name of a packaged comparison.
        overrides: added to those of the file.
        arms: `name: key=value ...`; axes: `key=value,value,...`; both are added to those of the file, or replace
            the one of the same name.
        seeds, reference: replace those of the file.
    Raises:
        ConfigError: nothing of that name, or any key or value is wrong.
    """
    if packaged is not None:
        known = list_comparisons()
        if packaged not in known:
            raise ConfigError(
                f"there is no packaged comparison {packaged!r}{closest(packaged, known)}; known: "
                f"{', '.join(known) or 'none'}"
            )
        file = Path(str(resources.files("cmapkd.recipes") / "compare" / f"{packaged}.yaml"))
        values, where = _read(file), f"comparison {packaged!r}"
        if source is not None:
            values["base"] = str(source)
    elif source is None:
        raise ConfigError("name a comparison file or a recipe, or a packaged comparison with --ablation NAME")
    elif Path(source).is_file() and _is_comparison(values := _read(Path(source))):
        where = f"comparison {str(source)!r}"
    elif Path(source).is_file() or str(source) in list_recipes():
        values, where = {"base": str(source)}, "comparison"
    else:
        known = list_recipes()
        raise ConfigError(
            f"there is no comparison file or recipe {str(source)!r}{closest(str(source), known)}: give a YAML file or "
            f"one of {', '.join(known)}"
        )
    values = dict(values)
    for key, added in (("arms", dict(map(parse_arm, arms))), ("axes", dict(map(parse_axis, axes)))):
        if added:
            below = values.get(key) or {}
            if not isinstance(below, dict):
                raise ConfigError(f"{where}: {key} must be a mapping, got {below!r}")
            values[key] = below | added
    if overrides:
        values["overrides"] = [*(values.get("overrides") or ()), *overrides]
    if seeds:
        values["seeds"] = list(seeds)
    if reference is not None:
        values["reference"] = reference
    return ComparisonConfig.from_mapping(values, where=where)


def _is_comparison(values: dict[str, Any]) -> bool:
    """Whether a file compares, rather than being a recipe: only `base` is a key of both."""
    return bool(values.keys() & (ComparisonConfig.model_fields.keys() - {"base"}))


def _read(path: Path) -> dict[str, Any]:
    """A comparison file's mapping, its `base` as a full path where it is a file beside it."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        if "${" in text:
            raise ConfigError(f"{path} uses '${{...}}': configs are plain data, write the value out")
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not readable YAML: {yaml_problem(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of keys, not {type(values).__name__}")
    read: dict[str, Any] = {str(key): value for key, value in values.items()}
    base = read.get("base")
    if isinstance(base, str) and Path(base).suffix and (beside := path.parent / base).is_file():
        read["base"] = str(beside.resolve())
    for section, key in (("tuning", "winners"), ("equal_time", "seconds")):
        values_of = read.get(section)
        if isinstance(values_of, dict) and isinstance(file := values_of.get(key), str):
            read[section] = {**values_of, key: str((path.parent / file).resolve())}
    return read

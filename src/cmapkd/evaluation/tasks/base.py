"""What a task is: scores of one or several models on one source, and how they are shown."""

from __future__ import annotations

from abc import ABC
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NamedTuple

from cmapkd.config import Config
from cmapkd.evaluation.subject import Bench, Subject
from cmapkd.models.base import DualEncoder, Model


class Column(NamedTuple):
    """A number in the readable table: its heading, where it stands in the scores, and its decimals."""

    head: str
    path: tuple[str, ...]
    digits: int = 1


class Headline(NamedTuple):
    """The one number that stands for a task. Steps are chosen by it, and gaps are closed on it. Higher is better."""

    label: str  # in metrics.jsonl
    path: tuple[str, ...]  # in the task's scores
    head: str  # in tables
    digits: int = 1  # decimals in tables
    unit: str = "percent"

    def shown(self, value: float, sign: str = "") -> str:
        """The number with its decimals; of `sign` `+` always with its sign."""
        return f"{value:{sign}z.{self.digits}f}"  # z: what rounds to 0 has no minus

    def amount(self, value: float, sign: str = "") -> str:
        """A difference, in a sentence: `1.2 points of answers`, `0.034 in -bits/byte`."""
        of = "points of" if self.unit == "percent" else "in"
        return f"{self.shown(value, sign)} {of} {self.head}"


class Task(ABC):
    """One way to measure models. A new one is a file with a subclass, and its line in `TASKS`; see docs/extending.md.

    Args:
        settings: of `Settings`; none: its defaults.
    """

    title: ClassVar[str]
    Settings: ClassVar[type[Config]] = Config  # which knows no key
    reads: ClassVar[type[Model]] = DualEncoder  # type: ignore[type-abstract]  # the contract that a model must keep
    headline: ClassVar[Headline | None] = None
    columns: ClassVar[tuple[Column, ...]] = ()
    alone: ClassVar[bool] = False  # a run can end with it: needs one model and the source, and no more than its teacher
    automatic: ClassVar[bool] = False  # part of tasks=auto
    needs_source: ClassVar[bool] = True
    needs_texts: ClassVar[bool] = True  # of a model that embeds: its text tower, unless it is a classifier
    needs_levels: ClassVar[bool] = False  # reads the pooled levels of the towers
    needs_negatives: ClassVar[bool] = False  # reads texts that are false of a sample
    needs_reference: ClassVar[bool] = False  # compares with the first of several models
    trains: ClassVar[bool] = False  # fits a head on another split

    def __init__(self, settings: Config | None = None) -> None:
        self.settings: Any = settings or self.Settings()

    @classmethod
    def is_automatic(cls, models: Collection[Model]) -> bool:  # noqa: ARG003  for tasks of some kinds of models
        """Whether tasks=auto measures these models by it, all of which it can read."""
        return cls.automatic

    def prepare(self, subject: Subject) -> None:  # noqa: B027
        """Refuses wrong names before the long part."""

    def missing(self, subject: Subject) -> str | None:  # noqa: ARG002
        """Why this source cannot be measured, or None."""
        return None

    def unlike(self, subjects: Sequence[Subject]) -> str | None:  # noqa: ARG002
        """Why these models cannot be measured beside each other, or None."""
        return None

    def measure(self, subjects: Sequence[Subject], bench: Bench) -> list[dict[str, Any]]:  # noqa: ARG002
        """Plain scores of each model, in order."""
        return [self.score(subject) for subject in subjects]

    def score(self, subject: Subject) -> dict[str, Any]:
        """Plain scores of one model, for tasks that measure each by itself."""
        raise NotImplementedError(f"{type(self).__name__} measures several models at once")

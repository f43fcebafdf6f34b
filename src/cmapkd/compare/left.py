"""How long the runs of a comparison that are not finished will take, from those that are."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean

from cmapkd.compare.rows import PlannedRun, config_digest
from cmapkd.config import counted
from cmapkd.training.progress import shown_time


class TimeLeft:
    """Keeps the seconds of finished runs, and estimates those of others.

    A run takes as long as the same run with other seeds. Where no seed is finished, it takes the seconds a step of the
    finished runs times its steps, or their mean where its steps are not known.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}  # by the run without its seed
        self._steps: dict[str, int] = {}

    def finished(self, run: PlannedRun, seconds: float, steps: int) -> None:
        """Takes note of a run: how long it took from its start to its scores, and its optimizer steps."""
        self._seconds.setdefault(_without_seed(run), []).append(seconds)
        self._steps[_without_seed(run)] = steps

    def seconds(self, runs: Iterable[PlannedRun]) -> float | None:
        """Of these runs together; None while no run is finished."""
        return sum(map(self._one, runs)) if self._seconds else None

    def said(self, runs: list[PlannedRun]) -> str:
        """In words, to be added to a line; empty while there is nothing to judge by."""
        seconds = self.seconds(runs)
        return f"; about {shown_time(seconds)} left for {counted(len(runs), 'run')}" if seconds and runs else ""

    def _one(self, run: PlannedRun) -> float:
        known = self._seconds.get(_without_seed(run))
        if known is not None:
            return mean(known)
        steps = run.config.training.steps
        if steps is None or not all(self._steps.values()):
            return mean(mean(found) for found in self._seconds.values())
        return steps * mean(mean(found) / self._steps[key] for key, found in self._seconds.items())


def _without_seed(run: PlannedRun) -> str:
    return config_digest(run.config.model_copy(update={"seed": 0}).plain())

"""What a person sees while training: a live bar on a terminal, plain lines elsewhere, and when the command will end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cmapkd.data.types import Batch

SILENCE = 30.0  # seconds after which a line is printed where there is no bar


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a command does besides one training's own steps, for its estimate of the time left.

    A sample that is measured counts as a pair that is trained on: a step is the teacher once and the student forward
    and backward, and an evaluation is the teacher once and up to two students forward.

    Attributes:
        validation: samples of one validation.
        more_trainings: of the same length, after this one.
        final: samples that are measured at the end.
    """

    validation: int = 0
    more_trainings: int = 0
    final: int = 0

    def pairs_left(self, step: int, total: int, *, batch_size: int, evaluate_every: int | None) -> int:
        """Pairs of work after `step` of `total` steps."""
        steps = total - step + self.more_trainings * total
        validations = 0
        if evaluate_every is not None and self.validation:
            each = -(-total // evaluate_every)  # the last step is validated, too
            validations = each - step // evaluate_every + self.more_trainings * each
        return steps * batch_size + max(0, validations) * self.validation + self.final


class Pace:
    """How fast a training goes in this sitting, and how long its command will take.

    Args:
        total: steps of the training; batch_size: pairs of each; evaluate_every: steps between validations.
    """

    def __init__(self, outlook: Outlook, *, total: int, batch_size: int, evaluate_every: int | None) -> None:
        self.outlook, self.total, self.batch_size, self.evaluate_every = outlook, total, batch_size, evaluate_every
        self._steps, self._seconds, self._first = 0, 0.0, 0.0
        self._line_steps, self._line_seconds = 0, 0.0
        self.waited = 0.0
        self.go()

    def reading(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; `waited` is how long the training waited for the last one."""
        remaining = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(remaining, None)
            self.waited = time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def go(self) -> None:
        """Starts the clock, at the beginning or after what is no step."""
        self._clock = time.perf_counter()

    def lap(self) -> float:
        """Counts a step; its seconds."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._first = self._first or seconds
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        self._line_steps, self._line_seconds = self._line_steps + 1, self._line_seconds + seconds
        return seconds

    def line_rate(self) -> float:
        """Pairs a second since it was last asked."""
        rate = self._line_steps * self.batch_size / self._line_seconds
        self._line_steps, self._line_seconds = 0, 0.0
        return rate

    @property
    def rate(self) -> float:
        """Pairs a second; without the first step, which is slow, as soon as there is another."""
        steps, seconds = (self._steps - 1, self._seconds - self._first) if self._steps > 1 else (1, self._seconds)
        return steps * self.batch_size / max(seconds, 1e-9)

    def seconds_left(self, step: int) -> float:
        """Of the whole command, after `step` steps."""
        every = self.evaluate_every
        return self.outlook.pairs_left(step, self.total, batch_size=self.batch_size, evaluate_every=every) / self.rate


def shown_time(seconds: float) -> str:
    """A length of time as `2:05`, `1:02:05` or `3 days`."""
    if seconds >= 48 * 3600:
        days = seconds / 86400
        return f"{days:.0f} days" if days < 10_000 else "over 10,000 days"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def shown_rate(pairs_per_second: float) -> str:
    """A throughput, with two digits where it is slow."""
    return f"{pairs_per_second:,.0f} pairs/s" if pairs_per_second >= 10 else f"{pairs_per_second:.2g} pairs/s"


READING = "reading"
"""The part of a training in which it waits for batches."""


def shown_parts(parts: Mapping[str, float], seconds: float, values: Mapping[str, float]) -> str:
    """What a method does beside its step, as `rollouts 62 % of the time, 12 % unfinished`; empty where it tells none.

    Args:
        parts: seconds of each part, of all `seconds`.
        values: of the last step; `PART/unfinished` is a share.
    """
    told = []
    for part in (part for part in parts if part != READING and seconds > 0):
        text = f"{part} {100 * parts[part] / seconds:.0f} % of the time"
        cut = values.get(f"{part}/unfinished", 0.0)
        told.append(f"{text}, {100 * cut:.0f} % unfinished" if cut else text)
    return "  ".join(told)


class TrainingDisplay:
    """Loss, throughput and the time left of the whole command; silent when `console` is None (all processes but the
    first)."""

    def __init__(self, console: Console | None, *, title: str, total: int, start: int, line_every: int) -> None:
        self.console, self.title, self.total, self.line_every = console, title, total, line_every
        self._bar: Progress | None = None
        self._spoke = time.monotonic()
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=start, numbers="", left="")

    def tick(self, step: int, *, pairs_per_second: float, seconds_left: float) -> None:
        """Shows that `step` steps are done, between the updates: on the bar, or in a line after a long silence."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, left=f"{shown_time(seconds_left)} left")
        elif time.monotonic() - self._spoke > SILENCE:
            self._line(step, f"{shown_rate(pairs_per_second)}  {shown_time(seconds_left)} left")

    def update(self, step: int, *, loss: float, pairs_per_second: float, seconds_left: float, parts: str = "") -> None:
        """Shows the state after `step` steps.

        Args:
            seconds_left: of the whole command.
            parts: see `shown_parts`.
        """
        numbers, left = f"loss {loss:.3f}  {shown_rate(pairs_per_second)}", f"{shown_time(seconds_left)} left"
        numbers += f"  {parts}" if parts else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers, left=left)
        elif step % self.line_every == 0 or step == self.total:
            self._line(step, f"{numbers}  {left}")

    def _line(self, step: int, text: str) -> None:
        self._spoke = time.monotonic()
        if self.console is not None:
            self.console.print(f"{self.title}: step {step}/{self.total}  {text}", highlight=False, markup=False)

    def say(self, message: str) -> None:
        """A line between the updates."""
        if self.console is not None:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

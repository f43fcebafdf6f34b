"""What a person sees while training: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingDisplay:
    """Loss, throughput and remaining time; silent when `console` is None (all processes but the first)."""

    def __init__(self, console: Console | None, *, title: str, total: int, start: int, line_every: int) -> None:
        self.console, self.title, self.total, self.line_every = console, title, total, line_every
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=start, numbers="")

    def update(self, step: int, *, loss: float, pairs_per_second: float, seconds_left: float) -> None:
        """Shows the state after `step` steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=f"loss {loss:.3f}  {pairs_per_second:,.0f} pairs/s")
        elif self.console is not None and (step % self.line_every == 0 or step == self.total):
            minutes, seconds = divmod(round(seconds_left), 60)
            self.console.print(
                f"{self.title}: step {step}/{self.total}  loss {loss:.3f}  {pairs_per_second:,.0f} pairs/s  "
                f"{minutes}:{seconds:02d} left",
                highlight=False,
            )

    def say(self, message: str) -> None:
        """A line between the updates."""
        if self.console is not None:
            self.console.print(message, highlight=False, markup=False)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

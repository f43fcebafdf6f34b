"""What a person sees while a cache is built."""

from __future__ import annotations

import time

from rich.console import Console


class BuildDisplay:
    """A line every few seconds; silent without a console.

    Args:
        what: is built, and of which units.
    """

    def __init__(
        self, console: Console | None, *, every: float = 5.0, what: tuple[str, str] = ("cache", "rows")
    ) -> None:
        self.console, self.every, self.what = console, every, what
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.console is None or (now - self._last < self.every and done < total):
            return
        self._last = now
        rate = done / max(now - self._start, 1e-6)
        minutes, seconds = divmod(round((total - done) / rate), 60)
        what, unit = self.what
        self.console.print(
            f"{what}: {done:,}/{total:,} {unit}  {rate:,.0f} {unit}/s  {minutes}:{seconds:02d} left", highlight=False
        )

"""What every demo does: it says what is to come, trains the student twice, scores, and ends in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmapkd.cli.command import command_line, resume_line
from cmapkd.cli.ending import tell_end

if TYPE_CHECKING:
    from cmapkd.run import RunConfig


@dataclass(frozen=True, slots=True)
class Demo:
    """One demo.

    Attributes:
        recipe: of the packaged ones.
        opening: what it does, said before torch is imported, which takes seconds.
        plan: lines on who learns from whom, how, and how long.
        lines: lines after the table of scores; of the config, the run folder and what `metrics.json` holds.
        gallery: cards of each outcome on the page.
    """

    recipe: str
    opening: str
    plan: Callable[[RunConfig], Iterable[str]]
    lines: Callable[[RunConfig, Path, dict[str, Any]], Iterable[str]]
    gallery: int


def demonstrate(demo: Demo, out: Path | None, overrides: Sequence[str]) -> None:
    """Runs a demo.

    Args:
        out: run folder; None: a new one under runs/.
        overrides: settings to change, key=value.
    """
    import time

    import typer
    from rich.console import Console

    from cmapkd.cli.recipe import checked_recipe, config_of
    from cmapkd.config import resumed_by

    values, console = checked_recipe(demo.recipe, overrides), Console()
    console.print(demo.opening, markup=False, highlight=False)
    config = config_of(demo.recipe, values)

    from cmapkd.cli.show import show
    from cmapkd.run import run
    from cmapkd.training import Interrupted

    out = out or Path("runs") / time.strftime(f"{demo.recipe}-%Y%m%d-%H%M%S")
    for line in demo.plan(config):
        console.print(line, markup=False, highlight=False)
    words = ("distill", demo.recipe, *overrides, "--out", str(out), "--resume")
    command = command_line(*words)
    try:
        with resumed_by(resume_line(*words)):
            result = run(config, out=out, console=console)
    except Interrupted as stopped:
        console.print(f"{stopped}. Go on with:\n  {command}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if not result.metrics:  # not the first of several processes
        return
    show(console, result.table())
    for line in demo.lines(config, out, result.metrics):
        console.print(line, markup=False, highlight=False)
    scored = command_line("evaluate", str(out), "--data", str(config.data.final))
    again = f" (scored again by: {scored})"
    tell_end(out, console, writes=config.writes, again=again, gallery=demo.gallery)

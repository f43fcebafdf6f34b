"""`cmapkd demo`: see a small model learn from a large one, with nothing to download and nothing to configure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmapkd.cli.command import command_line
from cmapkd.cli.demo_generative import demo_generative
from cmapkd.cli.report import CARDS, leave_page


def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder; by default a new one under runs/.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[generative] [KEY=VALUE]...", help="generative: models that write; then settings to change."
        ),
    ] = None,
) -> None:
    """Distil a packaged teacher into a small student. The same student trained alone stands beside it."""
    if overrides and overrides[0] == "generative":
        demo_generative(out, overrides[1:])
        return
    import time

    from rich.console import Console

    from cmapkd.cli.recipe import read_recipe

    config = read_recipe("demo", overrides)

    from cmapkd.cli.show import show
    from cmapkd.run import run
    from cmapkd.training import Interrupted

    console = Console()
    out = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    assert config.teacher is not None
    console.print(
        f"Teacher {config.teacher.name}, student {config.student.name}, method {config.method.name}, built-in world "
        f"{config.data.train}: the student is trained twice, with the teacher and without.",
        highlight=False,
    )
    try:
        result = run(config, out=out, console=console)
    except Interrupted as stopped:
        command = command_line("distill", "demo", *(overrides or []), "--out", str(out), "--resume")
        console.print(f"{stopped}. Go on with:\n  {command}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    show(console, result.table())
    again = command_line("evaluate", str(out), "--data", "scenes", "--split", "test")
    console.print(f"student and evidence: {out} (read back: {again})", markup=False, highlight=False, soft_wrap=True)
    if result.metrics:
        leave_page(out, console, gallery=CARDS)

"""`cmapkd demo`: see a small model learn from a large one, with nothing to download and nothing to configure."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cmapkd.cli.report import CARDS, leave_page


def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder; by default a new one under runs/.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value ...")] = None,
) -> None:
    """Distil the packaged teacher into a student several times smaller, beside the same student trained alone."""
    import time

    from rich.console import Console

    from cmapkd.config import load_config
    from cmapkd.run import RunConfig, run
    from cmapkd.training import Interrupted

    console = Console()
    out = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    config = load_config(RunConfig, "demo", overrides or [])
    assert config.teacher is not None
    console.print(
        f"Teacher {config.teacher.name}, student {config.student.name}, method {config.method.name}, built-in world "
        f"{config.data.train}: the student is trained twice, with the teacher and without.",
        highlight=False,
    )
    try:
        result = run(config, out=out, console=console)
    except Interrupted as stopped:
        command = shlex.join(["cmapkd", "distill", "demo", *(overrides or []), "--out", str(out), "--resume"])
        console.print(f"{stopped}. Go on with:\n  {command}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    console.print(result.table())
    console.print(f"student and evidence: {out} (read back: cmapkd evaluate {out} --data scenes)", highlight=False)
    if result.metrics:
        leave_page(out, console, gallery=CARDS)

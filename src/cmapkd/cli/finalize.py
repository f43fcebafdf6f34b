"""`cmapkd finalize`: the student and scores of a run that was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmapkd.cli.command import command_line, tell_start
from cmapkd.cli.ending import tell_end


def finalize(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that may change at a resume: key=value ...")
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            help="Step of the checkpoint to take, or best; by default the newest, or the best if the recipe says so."
        ),
    ] = None,
) -> None:
    """Make student and scores of a stopped run from a checkpoint, without training on."""
    from rich.console import Console

    from cmapkd.config import load_config, resumed_by

    tell_start(f"finalizing {run}: starting PyTorch")
    from cmapkd.cli.show import show
    from cmapkd.results import is_finished
    from cmapkd.run import RunConfig, finalize

    console = Console()
    if is_finished(run):
        said = f"{run} is finished: its student and metrics.json are written anew, from the checkpoint"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    chosen = [] if step is None else ["--step", step]
    command = command_line("finalize", str(run), *(overrides or []), *chosen)
    with resumed_by(f"Here that is, with the settings that change added:\n  {command}"):
        result = finalize(run, step=step, overrides=overrides or [], console=console)
    show(console, result.table())
    config = load_config(RunConfig, run / "config.yaml")
    tell_end(run, console, writes=config.writes, classifies=config.classifies, gallery=0)

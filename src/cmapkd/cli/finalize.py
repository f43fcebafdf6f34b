"""`cmapkd finalize`: the student and scores of a run that was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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

    from cmapkd.cli.show import show
    from cmapkd.config import load_config
    from cmapkd.run import RunConfig, finalize

    console = Console()
    result = finalize(run, step=step, overrides=overrides or [], console=console)
    show(console, result.table())
    tell_end(run, console, writes=load_config(RunConfig, run / "config.yaml").writes)

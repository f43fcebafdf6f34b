"""`cmapkd distill`: run a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cmapkd.cli.report import leave_page


def distill(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (cmapkd distill list) or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder: new, or an interrupted one with --resume.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
) -> None:
    """Train a student from a recipe and measure it beside its teacher."""
    from rich.console import Console

    from cmapkd.config import ConfigError, list_recipes, load_config

    console = Console()
    if recipe == "list":
        console.print("\n".join(list_recipes()))
        return
    if out is None:
        raise ConfigError("name the run folder: --out DIR")

    from cmapkd.run import RunConfig, run
    from cmapkd.training import Interrupted

    config = load_config(RunConfig, recipe, overrides or [])
    try:
        result = run(config, out=out, resume=resume, console=console)
    except Interrupted as stopped:
        command = shlex.join(["cmapkd", "distill", recipe, *(overrides or []), "--out", str(out), "--resume"])
        console.print(f"{stopped}. Go on with:\n  {command}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if result.metrics:
        console.print(result.table())
        console.print(f"student and evidence: {out}", highlight=False)
        leave_page(out, console)

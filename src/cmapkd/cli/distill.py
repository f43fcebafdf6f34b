"""`cmapkd distill`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmapkd.cli.command import command_line, resume_line, tell_start
from cmapkd.cli.ending import tell_end


def distill(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (cmapkd distill list) or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder: new, or an interrupted one with --resume.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    extend_to: Annotated[
        int | None,
        typer.Option(metavar="STEPS", help="Go on with the run in --out, finished or not, to so many steps."),
    ] = None,
) -> None:
    """Train a student from a recipe and measure it beside its teacher."""
    from rich.console import Console

    from cmapkd.cli.recipe import checked_recipe, config_of
    from cmapkd.config import ConfigError, list_recipes, recipe_summary, resumed_by

    console = Console()
    if recipe == "list":
        width = max(map(len, list_recipes()))
        for name in list_recipes():
            typer.echo(f"{name:{width}}  {recipe_summary(name)}")
        return
    if out is None:
        raise ConfigError("name the run folder: --out DIR")

    values = checked_recipe(recipe, overrides)
    tell_start(f"{'going on with' if resume or extend_to else 'distilling'} {recipe} in {out}: starting PyTorch")
    config = config_of(recipe, values)

    from cmapkd.cli.show import show
    from cmapkd.run import run
    from cmapkd.training import Interrupted

    how = ["--resume"] if extend_to is None else ["--extend-to", str(extend_to)]
    words = ("distill", recipe, *(overrides or []), "--out", str(out), *how)
    command = command_line(*words)
    try:
        with resumed_by(resume_line(*words)):
            result = run(config, out=out, resume=resume, extend_to=extend_to, console=console)
    except Interrupted as stopped:
        console.print(f"{stopped}. Go on with:\n  {command}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if result.metrics:
        if config.data.final is not None:
            show(console, result.table())
        tell_end(out, console, writes=config.writes, classifies=config.classifies, gallery=0)

"""`cmapkd doctor`: check a recipe before hours are spent on it."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value ...")] = None,
) -> None:
    """Check models, data, sizes, memory and time of a recipe without running it."""
    from rich.console import Console

    from cmapkd.config import load_config
    from cmapkd.diagnosis import diagnose
    from cmapkd.run import RunConfig

    config = load_config(RunConfig, recipe, overrides or [])
    findings = diagnose(config)
    console = Console()
    marks = {"ok": "[green]ok[/green]     ", "note": "[yellow]note[/yellow]   ", "problem": "[red]problem[/red]"}
    for finding in findings:
        console.print(marks[finding.level], end=" ")
        console.print(f"{finding.what}: {finding.detail}", markup=False, highlight=False)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)

"""`cmapkd doctor`: check a recipe before hours are spent on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from cmapkd.diagnosis import Finding


def doctor(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value ...")] = None,
) -> None:
    """Check a recipe without running it. Models, data, sizes, memory, disk and time are told as they are known."""
    from rich.console import Console
    from rich.markup import escape

    from cmapkd.cli.command import tell_start
    from cmapkd.cli.recipe import checked_recipe, config_of

    values = checked_recipe(recipe, overrides)
    tell_start(f"checking {recipe}: starting PyTorch")
    config = config_of(recipe, values)

    from cmapkd.diagnosis import examine, verdict

    console = Console()
    findings: list[Finding] = []
    with console.status("") as status:  # moves on a terminal; a file gets the findings alone
        for finding in examine(config, say=lambda what: status.update(escape(what))):
            findings.append(finding)
            _print(finding, console)
    console.print(verdict(findings), highlight=False)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def _print(finding: Finding, console: Console) -> None:
    """One finding: wrapped beside its mark on a terminal, one line in a file."""
    from rich.table import Table
    from rich.text import Text

    from cmapkd.config import printable

    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    mark = Text(f"{finding.level:7}", colours[finding.level])
    text = printable(f"{finding.what}: {finding.detail}")
    if console.is_terminal:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(mark, Text(text))
        console.print(grid)
    else:
        console.print(mark, text, markup=False, highlight=False, soft_wrap=True)

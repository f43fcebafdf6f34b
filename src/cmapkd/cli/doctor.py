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
    from rich.table import Table
    from rich.text import Text

    from cmapkd.config import load_config, printable
    from cmapkd.diagnosis import diagnose
    from cmapkd.run import RunConfig

    config = load_config(RunConfig, recipe, overrides or [])
    findings = diagnose(config)
    console = Console()
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    rows = [
        (Text(f"{each.level:7}", colours[each.level]), printable(f"{each.what}: {each.detail}")) for each in findings
    ]
    if console.is_terminal:  # wrapped beside its mark; in a file each finding is one line
        grid = Table.grid(padding=(0, 1))
        for mark, text in rows:
            grid.add_row(mark, Text(text))
        console.print(grid)
    else:
        for mark, text in rows:
            console.print(mark, text, markup=False, highlight=False, soft_wrap=True)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)

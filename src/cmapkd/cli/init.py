"""`cmapkd init`: look at data, and write a first recipe for them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cmapkd.cli.command import command_line, tell_start

TEACHER = "open_clip:ViT-B-32/openai"


def init(
    data: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="A folder of pictures, tables or tars, one file, or a source as recipes name it."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The recipe: a new file.")] = Path("recipe.yaml"),
    max_mb: Annotated[float, typer.Option(help="Most megabytes of the student's weights, in float32.")] = 100.0,
    max_ms: Annotated[
        float | None, typer.Option(help="Most milliseconds for one picture, on this machine's processor.")
    ] = None,
    teacher: Annotated[str, typer.Option(help="The teacher by name or folder; none: the student learns alone.")] = (
        TEACHER
    ),
) -> None:
    """Write a first recipe for your data. The student is the largest that fits the budget."""
    from rich.console import Console
    from rich.markup import escape

    from cmapkd.config import ConfigError
    from cmapkd.data.places import nearest

    if out.exists():  # before the work for it; `write_recipe` makes sure
        raise ConfigError(f"{out} exists, and init overwrites nothing: name another file with --out")

    if not Path(data).exists() and ":" not in data and data.partition("@")[0] != "scenes":  # a path, not a source
        raise ConfigError(f"there is no file or folder {data!r}. {nearest(data)}")

    tell_start(f"looking at {data}: starting PyTorch")
    from cmapkd.starter import check_teacher, choose_student, compose, look, weights_said, write_recipe

    check_teacher(teacher)
    console = Console()
    with console.status(escape(f"reading {data}")) as status:
        looked = look(data)
        steps = (lambda what: status.update(escape(what))) if console.is_terminal else tell_start
        chosen = choose_student(max_mb=max_mb, max_ms=max_ms, say=steps)
    given = ["cmapkd", "init", data, "--max-mb", f"{max_mb:g}"]
    given += ["--max-ms", f"{max_ms:g}"] if max_ms is not None else []
    given += ["--teacher", teacher] if teacher != TEACHER else []
    named = None if teacher == "none" else teacher
    write_recipe(out, compose(looked, chosen, teacher=named, command=shlex.join(given)))
    lines = [f"{role}: {source}" for role, source in looked.sources.items()]
    lines += looked.remarks
    threads = f"{chosen.threads} thread{'s'[: chosen.threads != 1]}"
    lines += [
        f"student: {chosen.student['name']}, {chosen.megabytes:.1f} MB in float32; here {chosen.image_ms:.1f} ms a "
        f"picture and {chosen.text_ms:.1f} ms a text, one at a time, {threads}",
        *filter(None, [None if named is None else weights_said(named)]),
        f"wrote {out}. Next:",
        f"  {command_line('doctor', str(out))}",
        f"  {command_line('distill', str(out), '--out', 'runs/first')}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

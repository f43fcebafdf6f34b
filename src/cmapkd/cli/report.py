"""`cmapkd report`: one page on what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmapkd.cli.command import command_line, tell_start

CARDS = 6
"""Of each outcome and direction, by default."""


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Run folders, comparison folders, export folders, files of cmapkd evaluate --json, in any mixture.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html in the first folder.")] = None,
    gallery: Annotated[
        int, typer.Option(help="Cards of each outcome; 0: no model is loaded, and the page takes seconds.")
    ] = CARDS,
    data: Annotated[
        str | None, typer.Option(help="Pictures of the gallery; by default the run's validation source.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a source that has several.")] = "val",
    seed: Annotated[int, typer.Option(help="Of the draw of the cards.")] = 0,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Whether the page shows pictures.")] = True,
    captions: Annotated[bool, typer.Option("--captions/--no-captions", help="Whether it shows captions.")] = True,
) -> None:
    """Write one self-contained page: verdict, scores, cost, curves, examples to look at, origins."""
    from rich.console import Console

    from cmapkd.config import in_bytes

    _refuse_missing(paths)
    tell_start(f"reading {', '.join(map(str, paths))}: starting PyTorch")

    from cmapkd.report import write_report

    console = Console()
    written = write_report(
        paths,
        out if out is not None else page_of(paths[0]),
        gallery=gallery,
        data=data,
        split=split,
        images=images,
        captions=captions,
        seed=seed,
        say=lambda message: console.print(message, markup=False, highlight=False, soft_wrap=True),
    )
    console.print(f"report: {written} ({in_bytes(written.stat().st_size)})", markup=False, highlight=False)


def _refuse_missing(paths: list[Path]) -> None:
    """Answers a misspelt path before torch is imported.

    Raises:
        ConfigError: nothing is at a path; with what is there under a similar name.
    """
    from cmapkd.config import ConfigError, closest

    for path in paths:
        if not path.exists():
            beside = sorted(str(path.parent / each.name) for each in path.parent.glob("*"))
            raise ConfigError(f"there is no {path}{closest(str(path), beside)}")


def leave_page(folder: Path, console: Any, *, gallery: int = 0) -> None:
    """Writes the page of a folder that was just finished, and names it.

    What was trained is worth more than the page: where the page cannot be written, a line says so, and nothing fails.
    """
    from cmapkd.config import printable
    from cmapkd.report import write_report

    try:
        written = write_report([folder], page_of(folder), gallery=gallery)
    except Exception as error:
        told = f"no report ({type(error).__name__}: {error})"
    else:
        told = f"report: {written}"
        if not gallery and (folder / "student").is_dir():
            told += f" (with examples to look at: {command_line('report', str(folder))})"
    console.print(printable(told), markup=False, highlight=False, soft_wrap=True)


def page_of(path: Path) -> Path:
    """Where a report goes that names no place: into the folder, or beside the file."""
    return path / "report.html" if path.is_dir() else path.with_name("report.html")

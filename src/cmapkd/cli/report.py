"""`cmapkd report`: one page on what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    ] = 6,
    data: Annotated[
        str | None, typer.Option(help="Pictures of the gallery; by default the run's validation source.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a source that has several.")] = "val",
    seed: Annotated[int, typer.Option(help="Of the draw of the cards.")] = 0,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Whether the page shows pictures.")] = True,
    captions: Annotated[bool, typer.Option("--captions/--no-captions", help="Whether it shows captions.")] = True,
) -> None:
    """Write one self-contained page: verdict, scores, cost, curves, retrievals to look at, origins."""
    from rich.console import Console

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
    console.print(f"report: {written} ({written.stat().st_size / 1e6:.1f} MB)", markup=False, highlight=False)


def page_of(path: Path) -> Path:
    """Where a report goes that names no place: into the folder, or beside the file."""
    return path / "report.html" if path.is_dir() else path.with_name("report.html")

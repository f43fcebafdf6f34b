"""What a run says last: where student and evidence are, the page, and how to use the student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cmapkd.cli.report import leave_page

if TYPE_CHECKING:
    from rich.console import Console


def tell_end(
    out: Path,
    console: Console,
    *,
    writes: bool = False,
    classifies: bool = False,
    again: str = "",
    gallery: int | None = None,
) -> None:
    """The last lines of a command that leaves a student in the run folder `out`.

    Args:
        writes: whether the student is a model that writes.
        classifies: whether it is a classifier.
        again: added to the first of them.
        gallery: cards of each outcome on the page; none: the command writes no page.
    """
    console.print(f"student and evidence: {out}{again}", markup=False, highlight=False, soft_wrap=True)
    if gallery is not None:
        leave_page(out, console, gallery=gallery)
    use = "classify(['a.jpg'])" if classifies else "embed(images=['a.jpg'], texts=['a dog'])"
    use = "answer(['a.jpg'], ['What is this?'])" if writes else use
    console.print(
        f"use the student in Python: cmapkd.load({str(out)!r}).{use}", markup=False, highlight=False, soft_wrap=True
    )

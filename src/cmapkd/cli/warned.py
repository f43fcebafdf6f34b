"""Warnings as a user reads them: a sentence, once, without the file and the line of the code that found it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Until the end every message of a warning is printed once, on stderr or where its caller says."""
    told: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],  # noqa: ARG001  as Python calls it
        filename: str,  # noqa: ARG001
        lineno: int,  # noqa: ARG001
        file: TextIO | None = None,
        line: str | None = None,  # noqa: ARG001
    ) -> None:
        from cmapkd.config import printable

        text = printable(f"warning: {message}")
        if text not in told:
            told.add(text)
            print(text, file=file or sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield

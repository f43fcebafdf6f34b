"""A command as it is parsed, and as it is told to be typed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand


class Command(TyperCommand):
    """Knows `--training.steps=5`, which is `training.steps=5`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for argument in args:
            key, equals, value = argument.removeprefix("--").partition("=")
            if argument.startswith("--") and "." in key and key.replace(".", "").replace("_", "").isalnum():
                ctx.fail(f"settings are written without dashes: {key}={value if equals else 'VALUE'}")
        return super().parse_args(ctx, args)


def command_line(*words: str) -> str:
    """`cmapkd WORDS` as its user would type it: by `uv run`, if this process was started so."""
    return shlex.join([*(["uv", "run"] if "UV_RUN_RECURSION_DEPTH" in os.environ else []), "cmapkd", *words])


def resume_line(*words: str) -> Callable[[tuple[str, ...]], str]:
    """What says how a run is resumed: the command of `words`, with the settings that an error asks for."""
    return lambda settings: f"Resume it with:\n  {command_line(*words, *settings)}"


def tell_start(what: str) -> None:
    """A first line, before torch is imported: it takes seconds in which nothing else is seen.

    It goes to stderr, so that what a command prints for other programs stays as it is.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"{what} ...", file=sys.stderr, flush=True)  # noqa: T201

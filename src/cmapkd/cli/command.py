"""A command that says how settings are written where they were given like options."""

from __future__ import annotations

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

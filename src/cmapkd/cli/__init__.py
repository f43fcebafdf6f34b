"""The command line: one command = one file. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

import cmapkd
from cmapkd.cli import (
    cache,
    compare,
    demo,
    distill,
    doctor,
    engine,
    evaluate,
    export,
    finalize,
    init,
    methods,
    models,
    report,
    select,
    settings,
)
from cmapkd.cli.command import Command
from cmapkd.cli.examples import examples
from cmapkd.cli.warned import plain_warnings
from cmapkd.freed_memory import keep_freed_memory

app = typer.Typer(
    name="cmapkd",
    help="Distil a large image-text model into a small one, and prove what it kept.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: half the time
    pretty_exceptions_enable=False,
)
for command in (
    demo.demo, init.init, doctor.doctor, distill.distill, finalize.finalize, evaluate.evaluate, export.export,
    report.report, select.select, engine.engine, methods.methods, models.models, settings.settings,
):  # fmt: skip
    app.command(cls=Command, epilog=examples(command.__name__))(command)
app.command(cls=compare.CompareCommand, epilog=examples("compare"))(compare.compare)
app.add_typer(cache.app, name="cache")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cmapkd {cmapkd.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: what a user can get wrong ends in one message, not in a stack trace.

    Of several processes that a launcher started the first one speaks; errors say whose they are.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  as long as the process
    _print_what_the_terminal_can()
    keep_freed_memory()
    try:
        with plain_warnings():
            app()
    except Exception as error:
        if not _is_users(error):
            raise
        from cmapkd.config import printable

        whose = f"error in process {rank}" if rank else "error"
        print(printable(f"{whose}: {_words(error)}"), file=sys.stderr)  # noqa: T201
        sys.exit(2)


def _print_what_the_terminal_can() -> None:
    """Letters that a terminal's encoding lacks are written as escapes: Greek in a card ends no command."""
    reconfigure: Any = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _is_users(error: Exception) -> bool:
    """ValueErrors, which say what to change, stopped runs, places that cannot be written; else a defect."""
    from cmapkd.config import RunStopped
    from cmapkd.config.disk import is_of_the_place

    return isinstance(error, ValueError | RunStopped) or is_of_the_place(error)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}. Choose another place"
    return "\n".join([str(error), *getattr(error, "__notes__", ())])

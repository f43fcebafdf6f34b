"""The command line: one command = one file. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import os
import sys

import typer

from cmapkd.cli import cache, compare, demo, distill, doctor, evaluate, export, methods, report

app = typer.Typer(
    name="cmapkd",
    help="Distil a large image-text model into a small one, and prove what it kept.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: half the time
    pretty_exceptions_enable=False,
)
for command in (
    demo.demo,
    distill.distill,
    evaluate.evaluate,
    export.export,
    report.report,
    methods.methods,
    doctor.doctor,
):
    app.command()(command)
app.command(cls=compare.CompareCommand)(compare.compare)
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Entry point: what a user can get wrong ends in one message, not in a stack trace.

    Of several processes that a launcher started the first one speaks; errors say whose they are.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  as long as the process
    try:
        app()
    except Exception as error:
        if not _is_users(error):
            raise
        from cmapkd.config import printable

        whose = f"error in process {rank}" if rank else "error"
        print(printable(f"{whose}: {error}"), file=sys.stderr)  # noqa: T201
        sys.exit(2)


def _is_users(error: Exception) -> bool:
    """ValueErrors, which say what to change, and stopped runs; anything else is a defect worth its trace."""
    from cmapkd.config import RunStopped

    return isinstance(error, ValueError | RunStopped)

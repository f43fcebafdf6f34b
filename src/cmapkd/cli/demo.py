"""`cmapkd demo`: see a small model learn from a large one, with nothing to download and nothing to configure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmapkd.cli.demo_generative import demo_generative
from cmapkd.cli.demonstrate import Demo, demonstrate
from cmapkd.cli.report import CARDS

if TYPE_CHECKING:
    from cmapkd.run import RunConfig

_OPENING = (
    "A small model (the student) learns to match pictures and captions from a large one (the teacher). Then the same "
    "student learns alone. In the end all three are scored. The data are drawn, so nothing is downloaded."
)


def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder; by default a new one under runs/.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[generative] [KEY=VALUE]...", help="generative: models that write; then settings to change."
        ),
    ] = None,
) -> None:
    """Distil a packaged teacher into a small student. The same student trained alone stands beside it."""
    if overrides and overrides[0] == "generative":
        demo_generative(out, overrides[1:])
        return
    demonstrate(Demo("demo", _OPENING, _plan, _lines, CARDS), out, overrides or ())


def _plan(config: RunConfig) -> list[str]:
    """Who learns from whom, how, and how long."""
    from cmapkd.config import counted

    assert config.teacher is not None
    steps = config.training.steps
    lengths = counted(steps, "step") if steps else f"{config.training.epochs:g} epochs"
    return [
        f"Teacher {config.teacher.name}, student {config.student.name}, method {config.method.name}, pictures "
        f"{config.data.train}.",
        f"Each of the two trainings takes {lengths} of {config.training.batch_size} pairs. R@1 is how often (%) the "
        "right caption or picture comes first.",
    ]


def _lines(config: RunConfig, out: Path, metrics: dict[str, Any]) -> list[str]:  # noqa: ARG001
    lesson = lesson_of(metrics)
    return [] if lesson is None else [lesson]


def lesson_of(metrics: dict[str, Any]) -> str | None:
    """The one sentence to take home; None where teacher, student and scratch share no recall.

    Args:
        metrics: what `metrics.json` holds.
    """
    from cmapkd.config import counted
    from cmapkd.evaluation.headline import number_at

    roles = ("teacher", "student", "baseline")
    teacher, student, scratch = (number_at(metrics.get(role), ("retrieval", "mean_r@1")) for role in roles)
    steps = metrics.get("steps")
    if teacher is None or student is None or scratch is None or not steps:
        return None
    length = counted(steps, "step")
    found = f"{student:.1f} % of its searches, and {scratch:.1f} % where it learned alone"
    if student - scratch < 1.0:
        return f"After {length} the student is right in {found}: so short a training shows nothing yet."
    smaller = metrics["teacher"]["params"] / metrics["student"]["params"]
    return (
        f"Take home: {smaller:.1f} times smaller than its teacher, the student is right in {found}. The pictures and "
        f"the {length} were the same: the teacher made the difference. The teacher is right in {teacher:.1f} %."
    )

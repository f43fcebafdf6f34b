"""`cmapkd demo generative`: see a small model learn to answer questions about pictures from a large one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmapkd.cli.demonstrate import Demo, demonstrate
from cmapkd.cli.report import CARDS

if TYPE_CHECKING:
    from cmapkd.run import RunConfig

RECIPE = "demo_generative"
SHOWN = 6
"""Questions whose answers are printed."""

_OPENING = (
    "A small model (the student) learns to answer questions about pictures from a large one (the teacher). Then the "
    "same student learns from the same answers alone. In the end all three are scored. The data are drawn, so nothing "
    "is downloaded."
)


def demo_generative(out: Path | None, overrides: Sequence[str]) -> None:
    """Distils a teacher that writes into a small student. The same student trained alone stands beside it.

    Args:
        out: run folder; None: a new one under runs/.
        overrides: settings to change, key=value.
    """
    demonstrate(Demo(RECIPE, _OPENING, _plan, _lines, CARDS), out, overrides)


def _plan(config: RunConfig) -> Iterator[str]:
    """Who learns from whom, how, and how long."""
    from cmapkd.config import counted

    teacher = config.teacher.name if config.teacher is not None else "none"
    names = f"Teacher {teacher}, student {config.student.name}, method {config.method.name}"
    yield f"{names}, pictures {config.data.train}."
    share = (
        f"one question in {round(1 / config.data.prompts.share)}" if config.data.prompts.share < 1 else "all questions"
    )
    steps = config.training.steps
    lengths = counted(steps, "step") if steps else f"{config.training.epochs:g} epochs"
    stored = " First the teacher's likeliest tokens are stored." if config.cache is not None else ""
    batch = f"{config.training.batch_size} pictures"
    yield f"Each of the two trainings sees {share} and takes {lengths} of {batch}.{stored}"


def _lines(config: RunConfig, out: Path, metrics: dict[str, Any]) -> Iterator[str]:
    yield from _answered(config, out)
    lesson = lesson_of(metrics)
    if lesson is not None:
        yield lesson


def _answered(config: RunConfig, out: Path) -> Iterator[str]:
    """One question about each of the first pictures of the final data, with the answers of all models."""
    from cmapkd.data.open import open_source
    from cmapkd.models import build_teacher, load_model
    from cmapkd.models.generative import GenerativeModel

    if config.data.final is None or config.teacher is None:
        return
    source = open_source(config.data.final, split="test" if config.data.test else "val")
    samples = [source[index] for index in range(min(SHOWN, len(source)))]
    asked = [
        (sample, sample.questions[place % len(sample.questions)])
        for place, sample in enumerate(samples)
        if any(sample.questions[place % len(sample.questions)].answers if sample.questions else ())
    ]
    models: dict[str, Any] = {"teacher": build_teacher(config.teacher), "student": load_model(out)}
    if (out / "baseline").is_dir():
        models[config.scratch().method.name] = load_model(out / "baseline")
    pictures, texts = [sample.image for sample, _ in asked], [question.question for _, question in asked]
    said: dict[str, list[str]] = {}
    for name, model in models.items():
        assert isinstance(model, GenerativeModel)
        said[name] = model.answer(pictures, texts, max_new_tokens=10) if asked else []
    yield from answers_in_words(
        [(text, question.answers) for text, (_, question) in zip(texts, asked, strict=True)], said
    )


def answers_in_words(asked: Sequence[tuple[str, Sequence[str]]], said: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A line for each question: the right answer, and what each model says.

    Args:
        asked: questions, each with its accepted answers.
        said: by model, an answer to each question.
    """
    for place, (question, right) in enumerate(asked):
        answers = ", ".join(f"{name}: {answers[place] or '(nothing)'}" for name, answers in said.items())
        yield f"{question}  right: {right[0]}, {answers}"


def lesson_of(metrics: Mapping[str, Any]) -> str | None:
    """The one sentence to take home; None where teacher, student and scratch were not all asked.

    Args:
        metrics: what `metrics.json` holds.
    """
    from cmapkd.evaluation.headline import number_at

    roles = ("teacher", "student", "baseline")
    teacher, student, scratch = (number_at(metrics.get(role), ("answering", "overall")) for role in roles)
    if teacher is None or student is None or scratch is None:
        return None
    found = f"{student:.1f} % of its answers, and in {scratch:.1f} % where it learned alone"
    asked = number_at(metrics["student"], ("scored", "questions")) or 1
    if student - scratch < 300 / (2 * asked) ** 0.5:  # three standard errors of a difference of shares near a half
        return f"The student is right in {found}: so few steps and questions show no clear gain."
    smaller = metrics["teacher"]["params"] / metrics["student"]["params"]
    return (
        f"Take home: {smaller:.1f} times smaller than its teacher, the student is right in {found}. Questions and "
        f"steps were the same, so the teacher made the difference. The teacher is right in {teacher:.1f} %."
    )

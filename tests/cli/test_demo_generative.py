"""`cmapkd demo generative`: what it says, and one whole demo of two steps with a small teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cli import call

from cmapkd.cli.demo_generative import RECIPE, _plan, answers_in_words, lesson_of
from cmapkd.cli.recipe import read_recipe
from cmapkd.models import ModelConfig, build_model

SMALL = {"vision_width": 24, "vision_layers": 1, "width": 32, "layers": 1, "patch_size": 16}


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: call(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_it_says_what_it_does_before_torch_is_imported(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any) -> None:
        raise ValueError("torch would be imported here")

    monkeypatch.setattr("cmapkd.cli.recipe.config_of", late)
    code, printed, errors = cli("demo", "generative")
    assert (code, errors) == (2, "error: torch would be imported here\n")
    assert " ".join(printed.split()).startswith("A small model (the student) learns to answer questions about pictures")


def test_a_wrong_setting_is_refused_before_anything_is_said(cli: Any) -> None:
    code, printed, errors = cli("demo", "generative", "training.stepz=3")
    assert (code, printed) == (2, "")
    assert "training.stepz" in errors


@pytest.mark.parametrize(
    ("change", "end"),
    [
        ([], "takes 240 steps of 32 pictures. First the teacher's likeliest tokens are stored."),
        (["training.steps=null", "training.epochs=1.5", "cache=off"], "takes 1.5 epochs of 32 pictures."),
        (["training.steps=1"], "takes 1 step of 32 pictures. First the teacher's likeliest tokens are stored."),
    ],
)
def test_the_plan_says_how_long_and_what_is_stored(change: list[str], end: str) -> None:
    assert list(_plan(read_recipe(RECIPE, change)))[-1].endswith(end)


def metrics(teacher: float, student: float, alone: float) -> dict[str, Any]:
    scores = {"teacher": teacher, "student": student, "baseline": alone}
    sizes = {"teacher": 800, "student": 100, "baseline": 100}
    asked = {"questions": 1000}  # where three standard errors are 6.7 points
    return {role: {"answering": {"overall": scores[role]}, "params": sizes[role], "scored": asked} for role in scores}


def test_the_sentence_to_take_home_has_the_numbers() -> None:
    lesson = lesson_of(metrics(90, 60.25, 50))
    assert lesson is not None
    assert lesson.startswith("Take home: 8.0 times smaller than its teacher, the student is right in 60.2 %")
    assert "in 50.0 % where it learned alone" in lesson
    assert "Questions and steps were the same, so the teacher made the difference." in lesson
    assert lesson.endswith("The teacher is right in 90.0 %.")


def test_a_student_that_gains_nothing_is_told_as_it_is() -> None:
    assert lesson_of(metrics(90, 56.5, 50)) == (  # the questions could have given as much by chance
        "The student is right in 56.5 % of its answers, and in 50.0 % where it learned alone: so few steps and "
        "questions show no clear gain."
    )
    assert "Take home" in str(lesson_of(metrics(90, 57.0, 50)))
    assert lesson_of({"student": {"answering": {"overall": 50.0}, "params": 1}}) is None


def test_a_question_is_shown_with_what_every_model_says() -> None:
    asked = [("Is it red?", ("yes", "no")), ("How many?", ("2",))]
    lines = list(answers_in_words(asked, {"teacher": ["yes", "2"], "student": ["no", ""]}))
    assert lines == [
        "Is it red?  right: yes, teacher: yes, student: no",
        "How many?  right: 2, teacher: 2, student: (nothing)",
    ]


def test_a_whole_demo(cli: Any, tmp_path: Path) -> None:
    texts = ["is there a red circle", "how many squares are there", "yes", "no", "2"]
    teacher = build_model(ModelConfig(name="tiny_vlm:small", options={**SMALL, "layers": 2}), captions=texts)
    teacher.save(tmp_path / "teacher")
    settings = [
        f"teacher={tmp_path / 'teacher'}",
        *(f"student.options.{name}={value}" for name, value in SMALL.items()),
        "data.train=scenes?length=60",
        "data.val=scenes@val?length=4",
        "data.test=scenes@test?length=4",
        f"cache.folder={tmp_path / 'cache'}",
        "training.steps=2",
        "training.batch_size=4",
        "training.evaluate_every=null",
        "optim.warmup_steps=1",
    ]
    code, printed, errors = cli("demo", "generative", *settings, "--out", str(tmp_path / "run"))
    assert code == 0, errors
    said = " ".join(printed.split())
    assert "Each of the two trainings sees one question in 20 and takes 2 steps of 4 pictures." in said
    assert said.count(", sft: ") == 4
    assert "sft: step " in said  # the baseline has one name everywhere
    assert "where it learned alone" in said
    assert ".answer(['a.jpg'], ['What is this?'])" in said
    assert "no report" not in said
    assert (tmp_path / "run" / "report.html").is_file()

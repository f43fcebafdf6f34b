"""The command line: what it prints, with which exit code, and that a signal ends it with a way to go on."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cmapkd
from cmapkd.cli import main
from cmapkd.data.open import open_source
from cmapkd.methods import METHODS
from cmapkd.models import build_model
from cmapkd.run import vocabulary_captions
from cmapkd.training import Interrupted
from started import begun


def call(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of the command."""
    monkeypatch.setattr(sys, "argv", ["cmapkd", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: call(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a few small steps with a teacher on disk."""
    folder = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(1)
    build_model("tiny:debug", captions=vocabulary_captions(open_source("scenes?length=50"))).save(folder / "teacher")
    values = {
        "teacher": str(folder / "teacher"),
        "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
        "data": {"train": "scenes?length=200&size=32", "val": "scenes@val?length=40&size=32"},
        "method": "hinton",
        "training": {"steps": 2, "batch_size": 16, "log_every": 1, "device": "cpu"},
        "evaluation": {"templates": "plain"},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return folder / "mine.yaml"


def test_methods_are_listed(cli: Any) -> None:
    code, out, _ = cli("methods")
    assert code == 0
    for name, method in METHODS.items():
        assert name in out
        assert method.card.title[:20] in out


@pytest.mark.parametrize("name", METHODS)
def test_card_of_a_method(cli: Any, name: str) -> None:
    code, out, _ = cli("methods", name)
    assert code == 0
    card = METHODS[name].card
    for text in (card.title, *card.equations, *card.departures, card.checked_against):
        assert "".join(text.split()) in "".join(out.split())
    for setting in METHODS[name].Config.model_fields:
        assert setting == "name" or f"{setting} = " in out


def test_methods_as_json(cli: Any) -> None:
    everything = json.loads(cli("methods", "--json")[1])
    assert list(everything) == list(METHODS)
    one = json.loads(cli("methods", "clip_kd", "--json")[1])
    assert one == everything["clip_kd"]
    assert one["settings"]["relational_weight"]["default"] == 1.0


def test_unknown_method(cli: Any) -> None:
    code, out, errors = cli("methods", "clip_kdd")
    assert (code, out) == (2, "")
    assert errors.startswith("error: there is no method 'clip_kdd' (did you mean 'clip_kd'?)")


def test_recipes_are_listed(cli: Any) -> None:
    code, out, _ = cli("distill", "list")
    assert code == 0
    assert "clip_kd_scenes" in out.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clip_kd_scene", "--out", "x"), "no recipe 'clip_kd_scene' (did you mean 'clip_kd_scenes'?)"),
        (
            ("demo", "optim.learning_rat=1", "--out", "x"),
            "optim.learning_rat: unknown key (did you mean 'learning_rate'?)",
        ),
        (
            ("demo", "method.task_wieght=1", "--out", "x"),
            "method.task_wieght: unknown key (did you mean 'task_weight'?)",
        ),
        (("demo",), "name the run folder: --out DIR"),
        (("demo", "seed", "--out", "x"), "override 'seed' is not key=value"),
    ],
)
def test_mistakes_end_in_one_message(cli: Any, arguments: tuple[str, ...], message: str) -> None:
    code, _, errors = cli("distill", *arguments)
    assert code == 2
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors


def test_defects_keep_their_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("cmapkd.config.list_recipes", broken)
    monkeypatch.setattr(sys, "argv", ["cmapkd", "distill", "list"])
    with pytest.raises(RuntimeError, match="a defect"):
        main()


def test_distil_then_evaluate_gives_the_same_numbers(cli: Any, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, printed, errors = cli("distill", str(recipe), "seed=3", "--out", str(out))
    assert code == 0, errors
    assert "student: step 2/2" in printed
    assert "hinton" in printed
    assert str(out) in printed
    stored = json.loads((out / "metrics.json").read_text())
    scores = tmp_path / "deep" / "scores.json"
    code, printed, _ = cli(
        "evaluate",
        str(out),
        "--data",
        "scenes@val?length=40&size=32",
        "--set",
        "templates=plain",
        "--json",
        str(scores),
    )
    assert code == 0
    assert "Scores on scenes/standard/val" in printed
    evaluated = json.loads(scores.read_text())
    assert evaluated["data"] == "scenes/standard/val"
    assert evaluated["models"] == {str(out): stored["student"]}
    assert evaluated["settings"]["templates"] == "plain"
    assert evaluated["environment"]["packages"]["torch"]
    assert "scored on 40 images and " in printed
    code, printed, errors = cli("evaluate", str(out), "--data", "scenes", "--json", str(tmp_path))
    assert (code, printed) == (2, "")  # before anything is loaded
    assert "is a folder: name a file" in errors
    code, printed, errors = cli("distill", str(recipe), "seed=3", "--out", str(out), "--extend-to", "3")
    assert code == 0, errors
    for words in (
        "going on from step 2 to step 3",
        "student: loading the teacher ",
        "warning: the run has 3 steps, and optim.warmup_steps is 100",
        "evaluating 1 of 2: teacher, on 40 samples of scenes/standard/val",
    ):
        assert words in printed
    code, _, errors = cli("finalize", str(out), "--step", "9")
    assert code == 2
    assert "has no checkpoint of step 9. It has --step 3." in errors
    code, printed, _ = cli("finalize", str(out))
    assert code == 0
    assert "taking the student out of " in printed


def test_evaluation_of_one_task(cli: Any, recipe: Path, tmp_path: Path) -> None:
    teacher, scores = str(recipe.parent / "teacher"), tmp_path / "s.json"
    data = ("--data", "scenes?length=20&size=32", "--split", "test", "--json", str(scores))
    assert cli("evaluate", teacher, *data, "--tasks", "retrieval")[0] == 0
    stored = json.loads(scores.read_text())
    assert "zero_shot" not in stored["models"][teacher]
    assert stored["data"] == "scenes/standard/test"
    code, _, errors = cli("evaluate", teacher, *data, "--tasks", "retrival")
    assert code == 2
    assert "did you mean 'retrieval'" in errors
    code, _, errors = cli("evaluate", teacher, *data, "--set", "templats=plain")
    assert code == 2
    assert "templats: unknown key (did you mean 'templates'?)" in errors
    code, _, errors = cli("evaluate", teacher, *data, "--set", "limit")
    assert code == 2
    assert "is not key=value" in errors
    code, _, errors = cli("evaluate", "no-such-model", *data)
    assert code == 2
    assert "there is no model 'no-such-model'" in errors


def test_models_side_by_side_and_the_cost_without_data(cli: Any, recipe: Path, tmp_path: Path) -> None:
    teacher, scores = str(recipe.parent / "teacher"), tmp_path / "s.json"
    quick = ("--set", "efficiency.rounds=3", "--set", "efficiency.warmup=0", "--set", "efficiency.batch_size=2")
    code, printed, errors = cli(
        "evaluate", f"first={teacher}", f"second={teacher}", "--tasks", "efficiency", *quick, "--json", str(scores)
    )
    assert code == 0, errors
    assert "first" in printed
    assert "second" in printed
    stored = json.loads(scores.read_text())
    assert stored["data"] is None
    assert stored["models"]["second"]["efficiency"]["ratio"]["parameters"] == 1
    code, _, errors = cli("evaluate", f"a={teacher}", f"a={teacher}", "--tasks", "efficiency")
    assert code == 2
    assert "two models are named 'a'" in errors
    code, _, errors = cli("evaluate", teacher, "--tasks", "retrieval")
    assert code == 2
    assert "retrieval: it needs data: name them with --data" in errors
    code, _, errors = cli("evaluate", teacher, "--data", "scenes", "--tasks", "vqa", "--set", "vqa.step=3")
    assert code == 2
    assert "vqa.step: unknown key (did you mean 'steps'?)" in errors
    code, _, errors = cli("evaluate", teacher, "--data", "scenes", "--train", "scenes@test", "--tasks", "vqa")
    assert code == 2
    assert "is a test split" in errors


def test_an_interrupted_demo_says_how_to_go_on(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted(7, Path("checkpoints/step-000000007"))

    monkeypatch.setattr("cmapkd.run.run", stopped)
    code, printed, _ = cli("demo", "--out", str(tmp_path / "a b"), "training.steps=9")
    assert code == 130
    assert "stopped after step 7; saved step-000000007" in printed
    assert f"cmapkd distill demo training.steps=9 --out '{tmp_path / 'a b'}' --resume" in printed


def test_a_signal_ends_with_130_and_the_run_can_go_on(cli: Any, recipe: Path, tmp_path: Path) -> None:
    out, changes = tmp_path / "cut off", ["training.steps=24", "training.batch_size=8", "data.workers=1"]
    script = tmp_path / "command.py"
    script.write_text("from cmapkd.cli import main\nmain()\n", encoding="utf-8")
    arguments = ("distill", str(recipe), *changes, "--out", str(out))
    lines = out / "metrics.jsonl"
    with begun(script, *arguments, timeout=480, environment={"COLUMNS": "80"}) as process:
        deadline = time.monotonic() + 240
        while process.lives and time.monotonic() < deadline:
            if lines.exists() and lines.read_text().count("\n") >= 3:
                os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the workers too
                break
            time.sleep(0.01)
        done = process.end()
    printed, errors = done.stdout, done.stderr
    assert done.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped after step" in printed
    assert "saved step-0000" in printed
    assert f"cmapkd distill {recipe} {' '.join(changes)} --out '{out}' --resume" in printed
    checkpoint = max((out / "checkpoints").iterdir())
    stopped = json.loads((checkpoint / "progress.json").read_text())["step"]
    assert 3 <= stopped < 24
    code, _, errors = cli("distill", str(recipe), *changes, "--out", str(out), "--resume")
    assert code == 0, errors
    assert cli("distill", str(recipe), *changes, "--out", str(tmp_path / "whole"))[0] == 0
    one, other = (cmapkd.load(folder).state_dict() for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    first, second = (
        [line.rpartition(', "pairs')[0] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, tmp_path / "whole")
    )
    assert first == second
    assert len(first) == 24

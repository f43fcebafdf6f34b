"""Runs that are prolonged, that are stopped and made whole, and what a finished run keeps."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.data.check import TooManyBadSamples
from cmapkd.models import build_model
from cmapkd.results import RunResult, is_finished
from cmapkd.run import RunConfig, finalize, run
from cmapkd.run.prolong import prolonged
from cmapkd.training import Interrupted, OptimConfig, trainer
from cmapkd.training.checkpoint import list_checkpoints, read_checkpoint
from cmapkd.training.optim import learning_rate


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("taught") / "model"
    torch.manual_seed(1)
    build_model("tiny:debug", captions=["a red square and a blue circle"] * 9).save(folder)
    return str(folder)


def settings(teacher: str, *, steps: int = 2, **changes: Any) -> dict[str, Any]:
    training = {"steps": steps, "batch_size": 8, "log_every": 1, "device": "cpu", **changes.pop("training", {})}
    return {
        "teacher": teacher,
        "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
        "data": {"train": "scenes?length=40&size=32", "val": "scenes@val?length=10&size=32"},
        "method": "clip_kd",
        "training": training,
        "optim": {"warmup_steps": 1, "schedule": "constant"},
        "quiet": True,
    } | changes


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return cmapkd.load(folder).state_dict()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def short(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("short") / "run"
    cmapkd.distill(**settings(teacher, baseline="scratch"), out=out)
    return out


def test_a_prolonged_run_is_the_longer_run(short: Path, teacher: str, tmp_path: Path) -> None:
    """Bit for bit, where the schedule does not know the end."""
    cmapkd.distill(**settings(teacher, steps=4), out=tmp_path / "long")
    result = cmapkd.distill(**settings(teacher, baseline="scratch"), out=short, extend_to=4)
    assert_equal(weights(short), weights(tmp_path / "long"))
    assert len((short / "baseline" / "metrics.jsonl").read_text().splitlines()) == 4
    assert result.metrics["extended"] == [{"at": 2, "from": 2}]
    assert (result.metrics["steps"], result.metrics["total_steps"]) == (4, 4)
    assert yaml.safe_load((short / "config.yaml").read_text())["training"]["steps"] == 4
    values = settings(teacher, baseline="scratch")
    del values["quiet"]
    assert prolonged(RunConfig.from_mapping(values), short, 4).training.steps == 4  # as after an interruption
    with pytest.raises(ConfigError, match=r"training.steps \(was 4, now 2\)"):
        cmapkd.distill(**settings(teacher, baseline="scratch"), out=short, resume=True)


def test_the_schedule_of_a_prolonged_run_is_that_of_its_new_length(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = settings(teacher, optim={"warmup_steps": 1}, quiet=False, baseline="none")
    cmapkd.distill(**values, out=tmp_path / "a")
    cmapkd.distill(**values, out=tmp_path / "a", extend_to=6)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    optim = OptimConfig(warmup_steps=1)
    wanted = [learning_rate(step, total=2 if step < 2 else 6, config=optim) for step in range(6)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(wanted)
    said = "".join(capsys.readouterr().out.split())
    assert "goingonfromstep2tostep6.Thescheduleisthatof6steps:thelearningrategoesonat0.000905" in said


def test_what_cannot_be_prolonged(teacher: str, tmp_path: Path) -> None:
    values = settings(teacher)
    with pytest.raises(ConfigError, match="there is no run to extend in"):
        cmapkd.distill(**values, out=tmp_path / "none", extend_to=9)
    cmapkd.distill(**values, out=tmp_path / "a", overrides=["training.keep_checkpoints=0"])
    assert not (tmp_path / "a" / "checkpoints").exists()
    with pytest.raises(ConfigError, match=r"--extend-to goes on from the last checkpoint, and .* has none"):
        cmapkd.distill(**values, out=tmp_path / "a", extend_to=9)
    with pytest.raises(ConfigError, match=r"keeps no checkpoints .*so there is nothing to go on with"):
        cmapkd.distill(**values, out=tmp_path / "a", resume=True)
    with pytest.raises(ConfigError, match="keeps no checkpoint: there is nothing to take a student from"):
        finalize(tmp_path / "a")
    stages = [{"name": "one", "share": 0.5}, {"name": "two", "share": 0.5}]
    values = settings(teacher, training={"stages": stages})
    cmapkd.distill(**values, out=tmp_path / "b")
    with pytest.raises(ConfigError, match=r"the stages of .* say which steps belong to which"):
        cmapkd.distill(**values, out=tmp_path / "b", extend_to=9)
    values = settings(teacher, method="fitnet")  # its stages are its own
    cmapkd.distill(**values, out=tmp_path / "c")
    with pytest.raises(ConfigError, match=r"the stages of .*/c \(hint, .*\) say which steps belong to which"):
        cmapkd.distill(**values, out=tmp_path / "c", extend_to=9)
    assert yaml.safe_load((tmp_path / "c" / "config.yaml").read_text())["training"]["steps"] == 2


def test_a_finished_run_keeps_its_last_checkpoint(teacher: str, tmp_path: Path) -> None:
    values = settings(teacher, steps=4, training={"evaluate_every": 2})
    cmapkd.distill(**values, out=tmp_path / "a")
    assert [path.name for path in list_checkpoints(tmp_path / "a" / "checkpoints")] == ["step-000000004"]
    assert len(list_checkpoints(tmp_path / "a" / "checkpoints", "best")) == 1
    with pytest.raises(ConfigError, match="has 4 steps already, name more"):
        cmapkd.distill(**values, out=tmp_path / "a", extend_to=3)
    del values["quiet"]
    run(RunConfig.from_mapping(values), out=tmp_path / "b", keep=0)  # as compare does
    assert not (tmp_path / "b" / "checkpoints").exists()


def test_finalize_takes_the_best_student_where_the_recipe_does(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter((3.0, 2.0, 1.0))
    monkeypatch.setattr("cmapkd.run.train.validator_of", lambda *_: lambda _: {"score": next(scores)})
    values = settings(teacher, steps=3, training={"evaluate_every": 1, "student": "best"})
    cmapkd.distill(**values, out=tmp_path / "a")
    best = weights(tmp_path / "a")
    finalize(tmp_path / "a")
    assert_equal(weights(tmp_path / "a"), best)
    finalize(tmp_path / "a", step="3")
    assert any(not torch.equal(value, best[key]) for key, value in weights(tmp_path / "a").items())


@pytest.fixture
def stopped(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """A run that was stopped after the first of its three steps."""

    @contextmanager
    def asked_at_once() -> Iterator[threading.Event]:
        event = threading.Event()
        event.set()
        yield event

    values = settings(teacher, steps=3, training={"evaluate_every": 1, "ema": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "signals", asked_at_once)
        with pytest.raises(Interrupted):
            cmapkd.distill(**values, out=tmp_path / "run")
    return tmp_path / "run", values


def test_a_stopped_run_gets_its_student(stopped: tuple[Path, dict[str, Any]], teacher: str, tmp_path: Path) -> None:
    out, values = stopped
    with pytest.raises(ValueError, match=r"is a run without student: .* cmapkd finalize "):
        cmapkd.load(out)
    result = finalize(out)
    tensors, _ = read_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    averaged = {key.removeprefix("module."): value for key, value in tensors["average"].items()}
    assert all(torch.equal(value, averaged[key]) for key, value in weights(out).items())
    assert (result.metrics["steps"], result.metrics["total_steps"]) == (1, 3)
    assert result.metrics["student"]["retrieval"]["num_images"] == 10
    assert "after step 1 of 3" in str(RunResult.read(out).table().caption)
    assert not is_finished(out)
    best = finalize(out, step="best")
    assert best.metrics["student"]["retrieval"] == result.metrics["student"]["retrieval"]
    with pytest.raises(ConfigError, match=r"no checkpoint of step 2\. It has --step 1, best\."):
        finalize(out, step="2")
    with pytest.raises(ConfigError, match=r"training.steps \(was 3, now 9\)"):
        finalize(out, overrides=["training.steps=9"])
    cmapkd.distill(**values, out=out, resume=True)  # it still goes on, to the end of an undisturbed run
    cmapkd.distill(**values, out=tmp_path / "whole")
    assert_equal(weights(out), weights(tmp_path / "whole"))
    assert is_finished(out)
    with pytest.raises(ConfigError, match="there is no run in"):
        finalize(tmp_path / "nothing")


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_of_a_run_have_the_rights_of_any_new_file(mask: int, teacher: str, tmp_path: Path) -> None:
    cached = {"mode": "auto", "folder": str(tmp_path / "c")}
    before = os.umask(mask)
    try:
        cmapkd.distill(**settings(teacher, cache=cached), out=tmp_path / "a")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".jsonl", ".yaml"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}
    assert not list(tmp_path.rglob("*.rights"))


def test_too_many_bad_samples_end_a_short_run_too(teacher: str, tmp_path: Path) -> None:
    from PIL import Image

    rows = ["image,caption"]
    for number in range(20):
        Image.new("RGB", (20 + number, 20)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,a picture {number}")
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    values = settings(teacher, data={"train": f"csv:{tmp_path}/train.csv", "val": "scenes@val?length=10&size=32"})
    with pytest.raises(TooManyBadSamples, match="more than max_bad_share 1 %") as stopped:
        cmapkd.distill(**values, out=tmp_path / "run")
    assert any("resume=True and overrides=['data.max_bad_share=0." in note for note in stopped.value.__notes__)
    result = cmapkd.distill(**values, out=tmp_path / "run", resume=True, overrides=["data.max_bad_share=0.9"])
    assert result.metrics["bad_samples"]["num_bad"] > 0

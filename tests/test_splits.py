"""Test splits are read once, at the end, and by no code that learns or chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cmapkd
import cmapkd.run.execute as runs
from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.scenes.source import ScenesSource
from cmapkd.data.types import Sample
from cmapkd.models import build_model
from cmapkd.run import RunConfig, vocabulary_captions


@pytest.mark.parametrize("method", ["contrastive", "clip_kd"])
def test_training_and_selection_never_read_the_test_split(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With validation, best checkpoint, a cache and a baseline: everything that a run may choose by."""
    torch.manual_seed(1)
    build_model("tiny:debug", captions=vocabulary_captions(open_source("scenes?length=50"))).save(tmp_path / "teacher")
    read: list[tuple[str, str]] = []  # phase, split
    phase = ["before"]
    get, say = ScenesSource.__getitem__, ScenesSource.captions

    def picture(self: ScenesSource, index: int) -> Sample:
        read.append((phase[0], self.split))
        return get(self, index)

    def captions(self: ScenesSource, index: int) -> tuple[str, ...]:
        read.append((phase[0], self.split))
        return say(self, index)

    def named(name: str, function: Any) -> Any:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            phase[0] = name
            result = function(*arguments, **more)
            phase[0] = "between"
            return result

        return wrapped

    monkeypatch.setattr(ScenesSource, "__getitem__", picture)
    monkeypatch.setattr(ScenesSource, "captions", captions)
    monkeypatch.setattr(runs, "train", named("training", runs.train))
    monkeypatch.setattr(runs, "measure", named("measuring", runs.measure))
    distils = method != "contrastive"
    cmapkd.distill(
        student={"name": "tiny:debug", "options": {"embed_dim": 16}},
        data={
            "train": "scenes?length=60&size=32",
            "val": "scenes@val?length=20&size=32",
            "test": "scenes@test?length=20&size=32",
        },
        method=method,
        training={
            "steps": 4, "batch_size": 8, "device": "cpu", "evaluate_every": 2, "student": "best", "log_every": 1
        },
        evaluation={"templates": "plain"},
        out=tmp_path / "run",
        quiet=True,
        **({"teacher": str(tmp_path / "teacher"), "baseline": "scratch"} if distils else {}),
    )  # fmt: skip
    assert {split for when, split in read if when == "training"} == {"train", "val"}
    assert {split for when, split in read if when == "measuring"} == {"test"}
    assert {when for when, split in read if split == "test"} == {"measuring"}


def test_validation_needs_a_task_to_choose_by() -> None:
    values = {
        "student": "tiny:debug",
        "data": {"train": "scenes", "val": "scenes@val"},
        "method": "contrastive",
        "training": {"steps": 2, "evaluate_every": 1},
        "evaluation": {"tasks": ["calibration"]},
    }
    with pytest.raises(ConfigError, match=r"is chosen by retrieval or zero_shot or .*, but .* calibration"):
        RunConfig.from_mapping(values)
    RunConfig.from_mapping(values | {"evaluation": {"tasks": ["calibration", "zero_shot"]}})
    RunConfig.from_mapping(values | {"evaluation": {}})

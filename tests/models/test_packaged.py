"""The teacher that ships with the package: small enough, loadable, and as good as its stored scores say."""

from __future__ import annotations

import json

import pytest
import torch

from cmapkd import load
from cmapkd.data.open import open_source
from cmapkd.evaluation.run import EvaluationConfig, evaluate
from cmapkd.models.tiny_family import packaged_models

MAX_BYTES = 10_000_000


@pytest.mark.parametrize("name", packaged_models())
def test_packaged_model_is_small_and_safe(name: str) -> None:
    files = list(packaged_models()[name].iterdir())
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    assert {file.suffix for file in files} == {".safetensors", ".json"}


def test_scenes_teacher_finds_captions_far_above_chance() -> None:
    teacher = load("tiny:scenes-teacher")
    scores = evaluate(teacher, open_source("scenes@val?length=100"), EvaluationConfig(), device=torch.device("cpu"))
    stored = json.loads((packaged_models()["scenes-teacher"] / "scores.json").read_text())["val"]
    assert scores["params"] == stored["params"]
    assert scores["retrieval"]["mean_r@1"] > stored["retrieval"]["mean_r@1"]  # 100 candidates instead of 1,000

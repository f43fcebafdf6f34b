"""Whole runs whose student has other tokens than its teacher: of its own texts, or a part of the teacher's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.models import GenerativeModel, ModelConfig, build_model, load_model
from cmapkd.run import RunConfig, run
from helpers import read_lines
from writers import STUDENT, TEACHER, TEXTS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    sizes = {"heads": 2, "vocab_size": 320, "max_tokens": 128}
    teacher = build_model(ModelConfig(name="tiny_vlm:small", options={**sizes, **TEACHER}), captions=list(TEXTS) * 4)
    teacher.save(folder)
    return {
        "student": {"name": "tiny_vlm:small", "options": {**sizes, **STUDENT}},
        "teacher": str(folder),
        "method": {"name": "token_kd", "top_k": 8},
        "data": {"train": "scenes?length=12", "val": "scenes@val?length=4", "prompts": "questions"},
        "training": {"steps": 3, "batch_size": 4, "log_every": 1},
        "optim": {"warmup_steps": 1},
        "evaluation": {"tasks": ["answering"], "writing": {"answer_tokens": 4}},
        "cache": "auto",
    }


def changed(recipe: dict[str, Any], *, options: dict[str, Any], method: dict[str, Any], cache: str) -> RunConfig:
    student = {**recipe["student"], "options": {**recipe["student"]["options"], **options}}
    values = {**recipe, "student": student, "method": {**recipe["method"], **method}, "cache": cache}
    return RunConfig.from_mapping(values)


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_student_with_a_tokenizer_of_its_own(recipe: dict[str, Any], cache: str, tmp_path: Path) -> None:
    config = changed(recipe, options={"tokenizer": "own"}, method={"alignment": "bytes"}, cache=cache)
    run(config, out=tmp_path / "run")
    student, teacher = load_model(tmp_path / "run"), load_model(recipe["teacher"])
    assert isinstance(student, GenerativeModel)
    assert isinstance(teacher, GenerativeModel)
    assert student.vocabulary.digest != teacher.vocabulary.digest
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert any("distillation" in key for key in lines[0])


def test_a_student_with_a_part_of_the_teachers_tokens(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = changed(recipe, options={"vocabulary": "texts"}, method={}, cache="off")
    run(config, out=tmp_path / "run")
    student, teacher = load_model(tmp_path / "run"), load_model(recipe["teacher"])
    assert isinstance(student, GenerativeModel)
    assert isinstance(teacher, GenerativeModel)
    assert student.vocabulary.size < teacher.vocabulary.size
    assert set(student.vocabulary.pieces) < set(teacher.vocabulary.pieces)

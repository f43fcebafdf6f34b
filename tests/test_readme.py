"""What the README shows in Python does what it says, letter for letter but for the names of large models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import cmapkd
from cmapkd.data.open import open_source
from cmapkd.models import DualEncoder, build_model
from cmapkd.run import vocabulary_captions
from helpers import MemorySource, make_model, make_teacher

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.usefixtures("one_thread")


def block(word: str) -> str:
    """The one block that holds `word`."""
    [found] = [each for each in BLOCKS if word in each]
    return str(found)


def test_every_block_of_the_readme_is_run_here() -> None:
    assert len(BLOCKS) == 2


def test_the_student_of_a_run_embeds_pictures_and_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model().save("runs/first/student")
    for index, name in enumerate(("cat.jpg", "dog.jpg")):
        MemorySource(2)[index].image.save(name)
    names: dict[str, Any] = {}
    exec(block("student.embed"), names)
    assert names["found"].similarity.shape == (2, 2)
    assert "tensor(" in capsys.readouterr().out


def test_a_loop_of_ones_own_saves_its_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = MemorySource(8)
    samples = [source[index] for index in range(8)]
    loader = [
        ([each.image for each in part], [each.captions[0] for each in part]) for part in (samples[:4], samples[4:])
    ]
    code = block("kd.student.save")
    for role, name in (("student", '"open_clip:ViT-B-16"'), ("teacher", '"open_clip:ViT-L-14/openai"')):
        assert f"{role}={name}" in code
        code = code.replace(f"{role}={name}", f"{role}={role}")
    student = make_model()
    exec(code, {"cmapkd": cmapkd, "torch": torch, "loader": loader, "student": student, "teacher": make_teacher()})
    loaded = cmapkd.load("student")
    assert isinstance(loaded, DualEncoder)
    torch.testing.assert_close(loaded.embed(texts="a cat").texts, student.eval().embed(texts="a cat").texts)


def test_the_arguments_that_the_readme_names_are_enough_for_a_run(tmp_path: Path) -> None:
    [call] = re.findall(r"`cmapkd\.distill\((.*)\)` is the command", README)
    teacher = tmp_path / "teacher"
    build_model("tiny:debug", captions=vocabulary_captions(open_source("scenes?length=20"))).save(teacher)
    values: dict[str, Any] = {
        "teacher": str(teacher),
        "student": "tiny:debug",
        "method": "clip_kd",
        "data": "scenes?length=20",
        "training": {"steps": 1, "batch_size": 4, "device": "cpu"},
        "out": str(tmp_path / "run"),
    }
    names = re.findall(r"(\w+)=\.\.\.", call)
    result = cmapkd.distill(**{name: values[name] for name in names}, quiet=True)
    assert result.metrics["steps"] == 1

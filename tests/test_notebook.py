"""The notebook of examples/: from a folder of pictures to a student, its scores and its export."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from cmapkd.data.open import open_source

NOTEBOOK = Path(__file__).parents[1] / "examples" / "own_photographs.py"


@pytest.mark.usefixtures("one_thread")
def test_the_notebook_runs_from_pictures_to_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, out = tmp_path / "my photographs", tmp_path / "out"
    pictures.mkdir()
    drawn = open_source("scenes?length=20", split="train")
    for index in range(len(drawn)):
        drawn[index].image.save(pictures / f"{index}.jpg")
        (pictures / f"{index}.txt").write_text("\n".join(drawn[index].captions), encoding="utf-8")
    drawn[0].image.save(pictures / "without a caption.jpg")  # is left out
    for name, value in {"PICTURES": pictures, "OUT": out, "STUDENT": "tiny:debug", "STEPS": 2}.items():
        monkeypatch.setenv(name, str(value))

    left = runpy.run_path(str(NOTEBOOK))

    assert {part: len(members) for part, members in left["parts"].items()} == {"test": 4, "val": 4, "train": 12}
    scores = json.loads((out / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert {role: scores[role]["retrieval"]["num_images"] for role in ("teacher", "student", "baseline")} == {
        "teacher": 4,
        "student": 4,
        "baseline": 4,
    }
    torch.testing.assert_close(left["found"].images.norm(dim=-1), torch.ones(4))
    assert sorted(path.name for path in (out / "onnx" / "onnx").iterdir()) == ["text_model.onnx", "vision_model.onnx"]
    assert "batch_size: 12" in (out / "run" / "config.yaml").read_text(encoding="utf-8")  # all that are trained on
    said = capsys.readouterr().out
    assert "20 photographs with captions" in said
    assert "measured on 4 photographs" in said


def test_every_cell_of_the_notebook_says_what_it_does() -> None:
    cells = NOTEBOOK.read_text(encoding="utf-8").split("\n# %%")[1:]
    kinds = ["text" if cell.startswith(" [markdown]") else "code" for cell in cells]
    assert kinds == ["text", "code"] * (len(cells) // 2)


def test_too_few_photographs_are_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(19):
        (tmp_path / f"{number}.jpg").touch()
        (tmp_path / f"{number}.txt").touch()
    monkeypatch.setenv("PICTURES", str(tmp_path))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    with pytest.raises(SystemExit, match="needs at least 20"):
        runpy.run_path(str(NOTEBOOK))
    assert not (tmp_path / "out").exists()
    assert "at least 20 photographs" in (NOTEBOOK.parents[1] / "docs" / "my_data.md").read_text(encoding="utf-8")

"""Every command knows the method, the source and the task of a package that is installed beside cmapkd."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from cli_support import run_commands

import cmapkd
from cmapkd.models import build_model
from plugin_support import PLUGIN, install

ROOT = Path(cmapkd.__file__).parents[2]
RECIPE = {
    "teacher": "teacher",
    "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
    "data": {"train": "colours", "val": "colours?length=12"},
    "method": {"name": "similarity", "similarity_weight": 3},
    "training": {"steps": 2, "batch_size": 6, "evaluate_every": 1, "student": "best", "device": "cpu"},
    "evaluation": {
        "templates": "plain",
        "tasks": ["own_caption", "retrieval"],
        "settings": {"own_caption": {"margin": 0.1}},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plugin")
    install(place / "site")
    torch.manual_seed(1)
    build_model("tiny:debug", captions=["a red picture", "a green picture", "a blue one"]).save(place / "teacher")
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return place


def call(folder: Path, *commands: list[str], code: int = 0, codes: Sequence[int] = ()) -> list[str]:
    """What each command prints, one after the other in a process that has the package on its path."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(folder / "site")]),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "COLUMNS": "200",
    }
    ends = run_commands(commands, cwd=folder, environment=environment)
    assert [end for end, *_ in ends] == ([*codes] or [code] * len(commands)), ends
    return [said for _, said, _ in ends]


def test_the_package_takes_less_than_a_hundred_lines() -> None:
    lines = [line for path in sorted(PLUGIN.glob("*.*")) for line in path.read_text(encoding="utf-8").splitlines()]
    assert 50 < sum(bool(line.strip()) for line in lines) < 100


def test_the_documentation_shows_exactly_this_package() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = re.findall(r"```(?:toml|python)\n(.*?)```", text, re.DOTALL)
    for name in ("pyproject.toml", "cmapkd_colours.py"):
        assert (PLUGIN / name).read_text(encoding="utf-8") in shown


def test_methods_distil_doctor_evaluate_and_cache_know_it(folder: Path) -> None:
    listed, card, checked, trained, measured, built = call(
        folder,
        ["methods", "--json"],
        ["methods", "similarity"],
        ["doctor", "recipe.yaml"],
        ["distill", "recipe.yaml", "--out", "run"],
        ["evaluate", "run", "--data", "colours", "--tasks", "own_caption", "--json", "scores.json"],
        ["cache", "build", "recipe.yaml", "--all"],
        codes=(0, 0, 1, 0, 0, 0),  # the doctor finds that the teacher has learned nothing
    )
    cards = json.loads(listed)
    assert cards["similarity"]["package"] == "cmapkd-colours 1.0"
    assert cards["similarity"]["settings"]["similarity_weight"]["default"] == 10.0
    assert {each["package"] for name, each in cards.items() if name != "similarity"} == {"cmapkd"}
    assert "package: cmapkd-colours 1.0" in card
    assert "data.train: 60 samples" in checked
    assert re.findall(r"^problem", checked, re.MULTILINE) == ["problem"]
    assert checked.endswith("1 problem, 1 note\n")
    assert "steps: " in checked
    assert "own caption" in trained
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["method"] == "similarity"
    assert metrics["evaluated_on"] == "colours"
    assert set(metrics["student"]) == {"own_caption", "retrieval", "params", "bad_samples", "scored"}
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("terms/similarity" in line for line in logged)
    assert any("validation/own_caption" in line for line in logged)
    assert "own_caption" in measured
    assert set(json.loads((folder / "scores.json").read_text())["models"]["run"]) >= {"own_caption", "params"}
    assert "built 240 rows" in built


def test_compare_knows_it(folder: Path) -> None:
    arms = ["--arms", "similarity: method=similarity", "--arms", "alone: method=contrastive"]
    work = ["training.evaluate_every=null", "training.student=last"]
    call(folder, ["compare", "recipe.yaml", *arms, "--seeds", "0", "--out", "compared", *work])
    table = (folder / "compared" / "table.md").read_text()
    assert "own caption share" in table
    assert "| alone (reference) |" in table
    assert "Retrieval is over 12 images, 12 captions." in table


def test_misspelt_names_of_the_package_get_the_nearest(folder: Path) -> None:
    asked, recipe, data = call(
        folder,
        ["methods", "similarty"],
        ["doctor", "recipe.yaml", "method.similarity_weigth=1", "evaluation.tasks=[own_captoin]"],
        ["distill", "recipe.yaml", "data.val=colors", "--out", "never"],
        code=2,
    )
    assert "did you mean 'similarity'" in asked
    assert "did you mean 'similarity_weight'" in recipe
    assert "did you mean 'own_caption'" in recipe
    assert "did you mean 'colours'" in data


def test_a_package_that_cannot_be_imported_is_named_and_hides_nothing(tmp_path: Path) -> None:
    install(tmp_path / "site", source="import a_library_that_is_not_there\n")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    cards = json.loads(call(tmp_path, ["methods", "--json"])[0])
    assert "cmapkd-colours 1.0 cannot be imported" in cards["similarity"]["problem"]
    assert "problem" not in cards["clip_kd"]
    assert "repair or uninstall that package" in call(tmp_path, ["doctor", "recipe.yaml"], code=2)[0]

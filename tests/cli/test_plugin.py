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


def call(folder: Path, *commands: Sequence[str], codes: Sequence[int]) -> list[str]:
    """What each command prints, one after the other in a process that has the package on its path."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(folder / "site")]),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "COLUMNS": "200",
    }
    ends = run_commands(commands, cwd=folder, environment=environment)
    assert [end for end, *_ in ends] == [*codes], ends
    return [said for _, said, _ in ends]


COMMANDS: dict[str, tuple[int, list[str]]] = {  # name: (exit code, command), one after the other in one process
    "listed": (0, ["methods", "--json"]),
    "card": (0, ["methods", "similarity"]),
    "checked": (1, ["doctor", "recipe.yaml"]),  # it finds that the teacher has learned nothing
    "trained": (0, ["distill", "recipe.yaml", "--out", "run"]),
    "measured": (0, ["evaluate", "run", "--data", "colours", "--tasks", "own_caption", "--json", "scores.json"]),
    "built": (0, ["cache", "build", "recipe.yaml", "--all"]),
    "compared": (0, [
        *("compare", "recipe.yaml", "--arms", "similarity: method=similarity", "--arms", "alone: method=contrastive"),
        *("--seeds", "0", "--out", "compared", "training.evaluate_every=null", "training.student=last"),
    ]),
    "misspelt method": (2, ["methods", "similarty"]),
    "misspelt settings": (2, [
        *("doctor", "recipe.yaml", "method.similarity_weigth=1", "evaluation.tasks=[own_captoin]"),
    ]),
    "misspelt data": (2, ["distill", "recipe.yaml", "data.val=colors", "--out", "never"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, str]:
    """What each of the commands prints."""
    codes, commands = zip(*COMMANDS.values(), strict=True)
    return dict(zip(COMMANDS, call(folder, *commands, codes=codes), strict=True))


def test_the_package_takes_less_than_a_hundred_lines() -> None:
    lines = [line for path in sorted(PLUGIN.glob("*.*")) for line in path.read_text(encoding="utf-8").splitlines()]
    assert 50 < sum(bool(line.strip()) for line in lines) < 100


def test_the_documentation_shows_exactly_this_package() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = re.findall(r"```(?:toml|python)\n(.*?)```", text, re.DOTALL)
    for name in ("pyproject.toml", "cmapkd_colours.py"):
        assert (PLUGIN / name).read_text(encoding="utf-8") in shown


def test_methods_distil_doctor_evaluate_and_cache_know_it(folder: Path, told: dict[str, str]) -> None:
    cards = json.loads(told["listed"])
    assert cards["similarity"]["package"] == "cmapkd-colours 1.0"
    assert cards["similarity"]["settings"]["similarity_weight"]["default"] == 10.0
    assert {each["package"] for name, each in cards.items() if name != "similarity"} == {"cmapkd"}
    assert "package: cmapkd-colours 1.0" in told["card"]
    assert "data.train: 60 samples" in told["checked"]
    assert re.findall(r"^problem", told["checked"], re.MULTILINE) == ["problem"]
    assert told["checked"].endswith("1 problem, 1 note\n")
    assert "steps: " in told["checked"]
    assert "own caption" in told["trained"]
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["method"] == "similarity"
    assert metrics["evaluated_on"] == "colours"
    assert set(metrics["student"]) == {"own_caption", "retrieval", "params", "bad_samples", "scored"}
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("terms/similarity" in line for line in logged)
    assert any("validation/own_caption" in line for line in logged)
    assert "own_caption" in told["measured"]
    assert set(json.loads((folder / "scores.json").read_text())["models"]["run"]) >= {"own_caption", "params"}
    assert "built 240 rows" in told["built"]


@pytest.mark.usefixtures("told")
def test_compare_knows_it(folder: Path) -> None:
    table = (folder / "compared" / "table.md").read_text()
    assert "own caption share" in table
    assert "| alone (reference) |" in table
    assert "Retrieval is over 12 images, 12 captions." in table


def test_misspelt_names_of_the_package_get_the_nearest(told: dict[str, str]) -> None:
    assert "did you mean 'similarity'" in told["misspelt method"]
    assert "did you mean 'similarity_weight'" in told["misspelt settings"]
    assert "did you mean 'own_caption'" in told["misspelt settings"]
    assert "did you mean 'colours'" in told["misspelt data"]


def test_a_package_that_cannot_be_imported_is_named_and_hides_nothing(tmp_path: Path) -> None:
    install(tmp_path / "site", source="import a_library_that_is_not_there\n")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    listed, checked = call(tmp_path, ["methods", "--json"], ["doctor", "recipe.yaml"], codes=(0, 2))
    cards = json.loads(listed)
    assert "cmapkd-colours 1.0 cannot be imported" in cards["similarity"]["problem"]
    assert "problem" not in cards["clip_kd"]
    assert "repair or uninstall that package" in checked

"""`benchmarks/photographs.py`: what it would do for each table, and what it says where data or packages are absent."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmapkd.compare import load_comparison

ROOT = Path(__file__).parents[1]

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "benchmarks")
    script: Any = importlib.import_module("photographs")


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["photographs.py", *arguments])
    script.main()


@pytest.mark.parametrize("name", [name for name, table in script.TABLES.items() if not table.script])
def test_every_comparison_is_made_of_declared_files(name: str) -> None:
    table = script.TABLES[name]
    comparison = load_comparison(ROOT / "examples" / f"{table.comparison}.yaml")
    asked = json.dumps(comparison.plain())
    if table.teacher is None:
        assert "runs/" not in asked
        return
    assert (ROOT / "examples" / f"{table.teacher}.yaml").is_file()
    for fold in range(table.folds):
        assert f"runs/{table.teacher}_{fold}" in asked or comparison.overrides[0] == "teacher=null"
        assert f"part={script.FOLDS[fold]}" in asked
    assert f"runs/{table.teacher}_{table.folds}" not in asked


def test_no_comparison_and_no_kept_score_is_without_its_command() -> None:
    examples = (ROOT / "examples").glob("photographs_*.yaml")
    declared = [path for path in examples if "arms" in yaml.safe_load(path.read_text(encoding="utf-8"))]
    assert {path.stem for path in declared} == {each.comparison for each in script.TABLES.values() if not each.script}
    kept = {path.stem.removeprefix("photographs_") for path in (ROOT / "docs" / "results").glob("photographs_*.*")}
    endings = ("_tuning", "_tuned", "_ranks")  # beside the scores of a comparison
    of_commands = {name + ending for name in script.TABLES for ending in ("", *endings)}
    assert kept - of_commands == {"teacher_three"}  # whose commands are in the file
    assert all((ROOT / table.script[0]).is_file() for table in script.TABLES.values() if table.script)


def test_what_is_finished_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = [*script.commands(script.TABLES["folds_parts"])]
    assert [command[1:4] for command in first[:2]] == [
        ["benchmarks/pretrained_parts.py", "parts", "--only"],
        ["-m", "cmapkd", "distill"],
    ]
    assert [command[0] for command in first] == ["python"] * (1 + 5 + 2) + ["rm", "cp", "mv"] + ["python"] * 2
    for fold in (0, 3):  # one is finished, one was stopped
        folder = tmp_path / "runs" / f"photographs_teacher_{fold}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    (tmp_path / "runs" / "photographs_teacher_0" / "metrics.json").touch()
    teachers = [command for command in script.commands(script.TABLES["mobile"]) if "distill" in command]
    assert len(teachers) == 4
    assert [command[-1] == "--resume" for command in teachers] == [False, False, True, False]
    (tmp_path / "runs" / "photographs_folds_parts.part" / "runs").mkdir(parents=True)  # a copy that was stopped
    assert len([*script.commands(script.TABLES["folds_parts"])]) == len(first) - 1
    (tmp_path / "runs" / "photographs_folds_parts").mkdir()
    assert not [command for command in script.commands(script.TABLES["folds_parts"]) if command[0] != "python"]
    assert [*script.commands(script.TABLES["beside"])][-1][1] == "benchmarks/photographs_beside.py"


def test_what_is_absent_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    called(monkeypatch, "folds")
    assert capsys.readouterr().out == f"skipped: the photographs of Flickr8k are not at {script.PICTURES}\n"
    (tmp_path / "shared" / "data" / "flickr8k").mkdir(parents=True)

    def not_installed(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(script, "distribution", not_installed)
    called(monkeypatch, "folds")
    told = capsys.readouterr().out
    assert told.startswith(f"skipped: the package {script.PACKAGES[0]} is not installed")
    assert "--group pretrained" in told
    called(monkeypatch, "folds", "--dry-run")
    assert capsys.readouterr().out.count("cmapkd distill") == 5
    called(monkeypatch)
    assert capsys.readouterr().out.split() == [*script.TABLES]

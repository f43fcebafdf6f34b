"""`benchmarks/photographs.py`: what it would do for each table, and what it says where data or packages are absent."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from cmapkd.compare import load_comparison

ROOT = Path(__file__).parents[1]

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "benchmarks")
    script: Any = importlib.import_module("photographs")


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["photographs.py", *arguments])
    script.main()


@pytest.mark.parametrize("name", script.TABLES)
def test_every_table_is_made_of_declared_files(name: str) -> None:
    table = script.TABLES[name]
    comparison = load_comparison(ROOT / "examples" / f"{table.comparison}.yaml")
    assert (ROOT / "examples" / f"{table.teacher}.yaml").is_file()
    asked = json.dumps(comparison.plain())
    for fold in range(table.folds):
        assert f"runs/{table.teacher}_{fold}" in asked
        assert f"part={script.FOLDS[fold]}" in asked
    assert f"runs/{table.teacher}_{table.folds}" not in asked


def test_what_is_finished_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = [*script.commands(script.TABLES["folds_parts"])]
    assert [command[1:4] for command in first[:2]] == [
        ["benchmarks/pretrained_parts.py", "parts", "--only"],
        ["-m", "cmapkd", "distill"],
    ]
    assert len(first) == 1 + 5 + 2 + 1 + 2
    assert first[8][:2] == ["cp", "-r"]
    for fold in (0, 3):  # one is finished, one was stopped
        folder = tmp_path / "runs" / f"photographs_teacher_{fold}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    (tmp_path / "runs" / "photographs_teacher_0" / "metrics.json").touch()
    teachers = [command for command in script.commands(script.TABLES["mobile"]) if "distill" in command]
    assert len(teachers) == 4
    assert [command[-1] == "--resume" for command in teachers] == [False, False, True, False]
    (tmp_path / "runs" / "photographs_folds_parts" / "runs").mkdir(parents=True)
    assert len([*script.commands(script.TABLES["folds_parts"])]) == 2


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

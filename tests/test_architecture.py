"""The shape of the code: rooms import only rooms to their left, and the loop knows no method."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cmapkd

ROOT = Path(cmapkd.__file__).parent
ROOMS = (
    "config",
    "data",
    "models",
    "features",
    "objectives",
    "weighting",
    "methods",
    "cache",
    "training",
    "evaluation",
    "export",
)
JOINING = (
    "freed_memory",
    "results",
    "provenance",
    "run",
    "engine",
    "compare",
    "report",
    "own_loop",
    "api",
    "diagnosis",
    "starter",
    "settings",
    "cli",
    "__main__",
)  # what stands above the rooms, in this order
RANK = {name: number for number, name in enumerate((*ROOMS, *JOINING))}
APART = {("evaluation", "training"), ("training", "evaluation")}


def part_of(path: Path) -> str:
    """The room or module that a file belongs to; empty for the package's own file."""
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if part == "__init__" else part


def imported(path: Path) -> Iterator[str]:
    """Rooms and modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            names = [f"cmapkd.{alias.name}" for alias in node.names] if module == "cmapkd" else [module]
        for name in names:
            if name.startswith("cmapkd."):
                yield name.split(".")[1]


FILES = sorted(path for path in ROOT.rglob("*.py") if part_of(path))


def test_every_part_has_a_place_in_the_order() -> None:
    assert {part_of(path) for path in FILES} - {"recipes", "weights"} <= RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_to_its_left(path: Path) -> None:
    here = part_of(path)
    for other in imported(path):
        if other == here or here == "recipes":
            continue
        assert other in RANK, f"{path} imports cmapkd.{other}, which has no place in the order"
        assert RANK[other] < RANK[here], f"{path} imports {other}, which stands to its right"
        if not path.is_relative_to(ROOT / "evaluation" / "probes"):  # which train heads, with the one trainer there is
            assert (here, other) not in APART, f"{path} imports {other}"


@pytest.mark.parametrize("path", sorted((ROOT / "training").glob("*.py")), ids=lambda path: path.name)
def test_the_training_loop_names_no_method(path: Path) -> None:
    from cmapkd.methods import METHODS

    text = path.read_text(encoding="utf-8")
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    strings = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    assert not names & {kind.__name__ for kind in METHODS.values()}
    assert not strings & (set(METHODS) - {"cmapkd"})  # the package's own name, which a tracker's project bears


@pytest.mark.parametrize("room", ["objectives"])
def test_objectives_know_no_config_and_no_processes(room: str) -> None:
    for path in (ROOT / room).glob("*.py"):
        assert set(imported(path)) <= {"objectives"}
        text = path.read_text(encoding="utf-8")
        assert "nn.Module" not in text
        assert "distributed" not in text


def test_every_file_says_in_its_first_line_what_it_tells() -> None:
    silent = [path for path in FILES if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"], ["evaluate", "--help"]])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from cmapkd.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'omegaconf', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout

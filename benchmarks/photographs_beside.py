"""What the students of the study on photographs can do beside retrieval, on data that none of them learned from.

    uv run python benchmarks/photographs_beside.py runs/photographs_folds --work runs/photographs_beside

The comparison examples/photographs_folds.yaml ran before; its students and teachers are read. Each seed is a fold.

- zero-shot: CIFAR-10's dev pictures in 10 classes, and 600 ImageNet pictures in 600 classes. The teacher's image tower
  was trained on ImageNet, with labels.
- heads: questions of NLVR (true or false) and of easy-VQA, by a head that learns on the frozen student.
- agreement with the fold's teacher, on the fold's test pictures.

Writes docs/results/photographs_beside.csv: a row for each arm and seed, with every score. Evaluations that are finished
are read back.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

COMPARISON = Path("examples/photographs_folds.yaml")
CSV = Path("docs/results/photographs_beside.csv")
DATA = "../shared/data"
ALL = ("scratch", "clip_kd", "clip_rd", "clip_kd + hints", "cmapkd, its default", "cmapkd", "cmapkd, no inner levels")
WITH_HEADS = ("scratch", "clip_kd + hints", "cmapkd")
COLUMNS = {
    "cifar10.top1": ("cifar10", "zero_shot", "top1"),
    "imagenet.top1": ("imagenet", "zero_shot", "top1"),
    "imagenet.top5": ("imagenet", "zero_shot", "top5"),
    "nlvr": ("nlvr", "vqa", "overall"),
    "nlvr.prior": ("nlvr", "vqa", "prior"),
    "easy_vqa": ("easy_vqa", "vqa", "overall"),
    "easy_vqa.prior": ("easy_vqa", "vqa", "prior"),
    "agreement.i2t.rank": ("agreement", "agreement", "i2t", "rank_correlation"),
    "agreement.t2i.rank": ("agreement", "agreement", "t2i", "rank_correlation"),
    "agreement.i2t.top1": ("agreement", "agreement", "i2t", "top1"),
    "agreement.t2i.top1": ("agreement", "agreement", "t2i", "top1"),
}


@dataclass(frozen=True)
class Asked:
    """One evaluation of several models: its name, the options of `cmapkd evaluate`, the arms that take part."""

    name: str
    options: tuple[str, ...]
    arms: tuple[str, ...]
    teacher: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the comparison")
    parser.add_argument("--work", type=Path, required=True, help="folder for scores and heads")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default all of the comparison")
    parser.add_argument("--csv", type=Path, default=CSV)
    arguments = parser.parse_args()
    declared = yaml.safe_load(COMPARISON.read_text(encoding="utf-8"))
    rows = []
    for seed in arguments.seeds or declared["seeds"]:
        fold = declared["folds"][seed]
        runs = finished(arguments.folder, seed)
        scores = {
            asked.name: evaluated(asked, fold["teacher"], runs, arguments.work / f"seed{seed}")
            for asked in questions(seed, fold["data.test"])
        }
        rows += [row_of(arm, seed, scores) for arm in ("teacher", *ALL)]
    with arguments.csv.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["arm", "seed", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(arguments.csv)


def questions(seed: int, test: str) -> Iterator[Asked]:
    """The teacher's heads learn in the first fold alone: its towers are frozen, and equal in all folds."""
    zero_shot, heads = ("--tasks", "zero_shot"), ("--tasks", "vqa")
    yield Asked("cifar10", ("--data", f"folder:{DATA}/cifar10/dev.zip", *zero_shot), ALL, True)
    present = f"imagenet:{DATA}/imagenet_samples/train.zip?classes=present"
    yield Asked("imagenet", ("--data", present, *zero_shot), ALL, True)
    yield Asked("agreement", ("--data", test, "--tasks", "agreement"), ALL, True)
    for name in ("nlvr", "easy_vqa"):
        learned = f"webdataset:{DATA}/{name}/train-*.tar"
        dev = f"webdataset:{DATA}/{name}/dev-000000.tar"
        yield Asked(name, ("--data", dev, "--train", learned, *heads), WITH_HEADS, seed == 0)


def finished(folder: Path, seed: int) -> dict[str, Path]:
    """Run folders of a seed by arm."""
    with (folder / "results.csv").open(encoding="utf-8", newline="") as stream:
        found = {
            row["arm"]: folder / "runs" / row["run"]
            for row in csv.DictReader(stream)
            if int(row["seed"]) == seed and row["status"] == "finished"
        }
    missing = [arm for arm in ALL if arm not in found]
    if missing:
        raise SystemExit(f"{folder} has no finished run of seed {seed} for {', '.join(missing)}: run the comparison")
    return found


def evaluated(asked: Asked, teacher: str, runs: dict[str, Path], work: Path) -> dict[str, Any]:
    """Scores by model of one evaluation, read back if it is finished."""
    path = work / f"{asked.name}.json"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        models = [f"teacher={teacher}"] if asked.teacher else []
        models += [f"{label(arm)}={runs[arm]}" for arm in asked.arms]
        heads = ("--work", str(work / asked.name)) if "--train" in asked.options else ()
        command = [sys.executable, "-m", "cmapkd", "evaluate", *models, *asked.options, *heads, "--json", str(path)]
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["models"]
    return found


def label(arm: str) -> str:
    """An arm's name as `cmapkd evaluate` takes one."""
    return re.sub(r"\W+", "_", arm)


def row_of(arm: str, seed: int, scores: dict[str, Any]) -> dict[str, Any]:
    """One row of the file; what was not measured for an arm stays empty."""
    row: dict[str, Any] = {"arm": arm, "seed": seed}
    for column, (evaluation, *path) in COLUMNS.items():
        value = scores[evaluation].get(label(arm))
        for key in path:
            value = (value or {}).get(key)
        row[column] = "" if value is None else value
    return row


if __name__ == "__main__":
    main()

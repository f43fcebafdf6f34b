"""The scores of the final comparison, which takes longer than one sitting: kept in two files of runs.

    uv run cmapkd compare examples/cmapkd_final.yaml --seeds 3 --out runs/final
    uv run python benchmarks/final.py add runs/final      # into docs/results/cmapkd_final_{early,long}.csv
    uv run python benchmarks/tables.py --write            # the tables of docs/results/cmapkd.md

A run that the files have already is not added twice. Its scores must then be the same, within what another machine's
arithmetic makes of them (`--tolerance` points of R@1).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path("docs/results")
FILES = {400: FOLDER / "cmapkd_final_early.csv", 2400: FOLDER / "cmapkd_final_long.csv"}
R1, ZERO_SHOT, OOD = "retrieval.mean_r@1", "zero_shot.top1", "ood.retrieval.mean_r@1"
FIELDS = (
    "arm", "student", "training.steps", "method", "seed", R1, ZERO_SHOT, OOD, "params", "extra_params", "steps",
    "batch_size", "train_seconds",
)  # fmt: skip
KEY = ("arm", "student", "seed")

Rows = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add")
    add.add_argument("folder", type=Path, help="of a comparison")
    add.add_argument("--tolerance", type=float, default=1.0)
    arguments = parser.parse_args()
    for line in add_runs(arguments.folder, arguments.tolerance):
        print(line)


def read(path: Path) -> Rows:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def add_runs(folder: Path, tolerance: float) -> list[str]:
    """Puts a comparison's finished runs into the files; says what it did."""
    runs = json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]
    told = []
    for steps, path in FILES.items():
        rows = read(path)
        known = {tuple(row[key] for key in KEY): row for row in rows}
        for run in runs:
            if run["status"] != "finished" or run["steps"] != steps:
                continue
            row = _row(run)
            before = known.get(tuple(row[key] for key in KEY))
            if before is None:
                rows.append(row)
                told.append(f"added {run['run']}")
            elif abs(float(before[R1]) - float(row[R1])) > tolerance:
                raise SystemExit(f"{run['run']} has R@1 {row[R1]}, but {path} has {before[R1]}: one of them is not it")
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        rows.sort(key=lambda row: (int(row["seed"]), arms.index(row["arm"]), row["student"] != "5 x"))
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return told


def _row(run: Mapping[str, object]) -> dict[str, str]:
    scores = run["student"]
    assert isinstance(scores, dict)
    axes = run["axes"]
    assert isinstance(axes, dict)
    found = {
        "arm": run["arm"],
        **axes,
        R1: f"{scores['retrieval']['mean_r@1']:.2f}",
        ZERO_SHOT: f"{scores['zero_shot']['top1']:.2f}",
        OOD: f"{scores['ood']['retrieval']['mean_r@1']:.2f}",
        "params": scores["params"],
        **{key: run[key] for key in ("method", "seed", "extra_params", "steps", "batch_size", "train_seconds")},
    }
    return {field: str(found[field]) for field in FIELDS}


if __name__ == "__main__":
    main()

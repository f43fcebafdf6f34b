"""Means of a number that runs logged, between two steps, for each finished run of a comparison.

    uv run python benchmarks/logged.py runs/dho gradient_cosine --after 300 --json docs/results/dho_gradient_cosine.json

The JSON has the number, the steps, and a row for each run that logged it: arm, axes, seed, and the mean.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the comparison")
    parser.add_argument("number", help="as metrics.jsonl calls it")
    parser.add_argument("--after", type=int, default=0, help="steps that do not count")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    with (arguments.folder / "results.csv").open(encoding="utf-8", newline="") as stream:
        runs = [run for run in csv.DictReader(stream) if run["status"] == "finished"]
    means: dict[str, dict[str, float]] = {}
    for run in runs:
        logged = values(arguments.folder / "runs" / run["run"] / "metrics.jsonl", arguments.number, arguments.after)
        if logged:
            means.setdefault(run["row"], {})[run["seed"]] = round(statistics.fmean(logged), 4)
    if not means:
        raise SystemExit(f"no run of {arguments.folder} logged {arguments.number} after step {arguments.after}")
    told = {"number": arguments.number, "after": arguments.after, "means": means}
    arguments.json.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(arguments.json)


def values(path: Path, number: str, after: int) -> list[float]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line[number] for line in lines if number in line and line.get("step", 0) > after]


if __name__ == "__main__":
    main()

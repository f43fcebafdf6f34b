"""What each selection of levels reached, and how much of the costly levels it used: a table and a picture.

    uv run cmapkd compare examples/cmapkd_selection.yaml --out runs/selection
    uv run python benchmarks/selection.py runs/selection --csv docs/results/cmapkd_selection.csv \
        --png docs/images/cmapkd_cost.png

A run's cost is sum_i p_i cost_i over the levels of both modalities, p_i a level's share of its modality's weight, mean
of the last quarter of the run; as a share of what uniform weights on every level cost. Costs are the policy's.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

SIDES = {"visual": ("P2", "P3", "P4", "P5"), "language": ("L1", "L2", "L3", "L4")}
METRICS = {"retrieval.mean_r@1": ("retrieval", "mean_r@1"), "zero_shot.top1": ("zero_shot", "top1")}
COLOURS = {"uniform": "#7a7a7a", "policy": "#b3541e", "gate": "#8b5fbf", "attention": "#8b5fbf", "levels": "#1f6f5c"}
LEFT = ("attention", "policy, cost 300")  # arms whose names stand to the left of their mean: right of it is another's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a finished comparison, one arm of which is named uniform")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--png", type=Path, required=True)
    arguments = parser.parse_args()
    rows = read(arguments.folder)
    with arguments.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows).savefig(arguments.png, dpi=160)


def read(folder: Path) -> list[dict[str, Any]]:
    """One row a finished run: its scores, the mean weight of every level, the weights' entropies, and its cost."""
    runs = json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]
    configs = {
        run["run"]: yaml.safe_load((folder / "runs" / run["run"] / "config.yaml").read_text(encoding="utf-8"))
        for run in runs
    }
    costs = next(found for each in configs.values() if (found := each["method"]["weighting"].get("costs")))
    everything = sum(statistics.mean(costs[level] for level in levels) for levels in SIDES.values())
    rows = []
    for run in runs:
        if run["status"] != "finished":
            continue
        weights = weights_at_the_end(folder / "runs" / run["run"])
        cost = sum(
            weights.get(f"{side}/weight/{level}", 0) * costs[level] / present(weights, side)
            for side, levels in SIDES.items()
            for level in levels
        )
        row = {"arm": run["arm"], "seed": run["seed"], "steps": run["steps"]}
        row |= {name: round(dig(run["student"], path), 2) for name, path in METRICS.items()}
        row |= {
            level: round(weights[name], 3) if (name := f"{side}/weight/{level}") in weights else ""
            for side, levels in SIDES.items()
            for level in levels
        }
        row |= {f"{side}_entropy": round(weights[f"{side}/entropy"], 3) for side in SIDES}
        rows.append(row | {"cost": round(cost / everything, 4), "seconds_per_step": round(run["seconds_per_step"], 3)})
    return rows


def weights_at_the_end(run: Path) -> dict[str, float]:
    """Means over the last quarter of the lines that were logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = lines[-max(1, len(lines) // 4) :]
    names = [name for name in lines[-1] if "/weight/" in name or name.endswith("/entropy")]
    return {name: statistics.mean(line[name] for line in lines if name in line) for name in names}


def present(weights: dict[str, float], side: str) -> int:
    return sum(name.startswith(f"{side}/weight/") for name in weights)


def dig(values: Any, path: tuple[str, ...]) -> float:
    for key in path:
        values = values[key]
    return float(values)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Mean R@1 against cost: a small dot for each seed, a diamond for the arm's mean, with its name."""
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for arm in dict.fromkeys(row["arm"] for row in rows):
        runs = [row for row in rows if row["arm"] == arm]
        costs, scores = [100 * row["cost"] for row in runs], [row["retrieval.mean_r@1"] for row in runs]
        colour = next((colour for start, colour in COLOURS.items() if arm.startswith(start)), "#3a6ea5")
        axes.plot(costs, scores, "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
        middle = statistics.mean(costs), statistics.mean(scores)
        axes.plot(*middle, "D", color=colour, markersize=7)
        place, side = ((-7, -10), "right") if arm in LEFT else ((7, 5), "left")
        axes.annotate(arm, middle, place, textcoords="offset points", fontsize=8, color=colour, ha=side)
    axes.set_xlim(0, 1.15 * max(100 * row["cost"] for row in rows))
    axes.set_xlabel("cost of the levels used, in % of uniform weights on all eight (bytes of a cache row)", fontsize=9)
    axes.set_ylabel("mean R@1, validation", fontsize=9)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()

"""The picture of the demo: teacher, the student that it teaches, and the same student alone. A dot for each seed.

    uv run --group bench python benchmarks/draw_demo.py docs/images/demo.png

The numbers are those of examples/demo.yaml: the demo's setting, test split, five seeds.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "docs/results/demo_seeds.csv"
TEACHER = ROOT / "src/cmapkd/weights/scenes-teacher/scores.json"
METRICS = {"R@1 (%)": ("retrieval", "mean_r@1"), "zero-shot accuracy (%)": ("zero_shot", "top1")}
BARS = {"scratch": ("student, alone", "#d9a441"), "cmapkd": ("student, taught by cmapkd", "#1f6f5c")}


def main(out: str) -> None:
    with RUNS.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] in BARS]
    teacher = json.loads(TEACHER.read_text(encoding="utf-8"))["test"]
    figure = Figure(figsize=(8, 2.6), layout="tight")
    for panel, (head, path) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        bars = [
            (label, colour, [float(row[".".join(path)]) for row in rows if row["arm"] == arm])
            for arm, (label, colour) in BARS.items()
        ]
        bars.append(("teacher", "#9aa5b1", [teacher[path[0]][path[1]]]))
        for place, (_, colour, values) in enumerate(bars):
            mean = statistics.fmean(values)
            panel.barh(place, mean, color=colour, height=0.65)
            panel.plot(values, [place] * len(values), "o", color="black", markersize=3, alpha=0.7)
            panel.text(max(values) + 0.8, place, f"{mean:.1f}", va="center", fontsize=9)
        sizes = [int(row["params"]) for row in rows[:1]] * len(BARS) + [teacher["params"]]
        first = head == next(iter(METRICS))
        named = [f"{label}\n{size / 1e6:.2f} M parameters" for (label, _, _), size in zip(bars, sizes, strict=True)]
        panel.set_yticks(range(len(bars)), named if first else [""] * len(bars), fontsize=8)
        panel.set_title(head, fontsize=10, loc="left")
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=160)


if __name__ == "__main__":
    main(sys.argv[1])

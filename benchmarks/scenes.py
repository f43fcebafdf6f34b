"""The demo's comparison over seeds: one student from scratch and distilled, at equal steps; JSON, table, figure.

    uv run --group bench python benchmarks/scenes.py --seeds 0 1 2

Finished runs are read back, interrupted ones go on. The recipe is `demo`, so this measures what a newcomer sees.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from cmapkd.provenance import describe_environment
from photos import dig, finished

METHODS = ("contrastive", "hinton", "clip_kd")
NUMBERS = {
    "mean R@1": ("retrieval", "mean_r@1"),
    "i2t R@5": ("retrieval", "i2t", "r@5"),
    "t2i R@5": ("retrieval", "t2i", "r@5"),
    "zero-shot": ("zero_shot", "top1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in arguments.methods}
    for seed in arguments.seeds:
        for method in arguments.methods:
            out = arguments.runs / "scenes" / f"{method}-{seed}"
            runs[method].append(finished("demo", out=out, method=method, seed=seed, baseline="none"))
    teacher = runs[arguments.methods[0]][0]["teacher"]
    scores = {"teacher": [teacher], **{method: [run["student"] for run in done] for method, done in runs.items()}}
    result = {
        "seeds": arguments.seeds,
        "parameters": {name: done[0]["params"] for name, done in scores.items()},
        "steps": runs[arguments.methods[0]][0]["steps"],
        "batch_size": runs[arguments.methods[0]][0]["batch_size"],
        "train_seconds": {method: [run["train_seconds"] for run in done] for method, done in runs.items()},
        "scores": {
            name: {label: [dig(score, path) for score in done] for label, path in NUMBERS.items()}
            for name, done in scores.items()
        },
        "environment": describe_environment(),
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    target = arguments.results / "scenes_demo.json"
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(markdown(result))
    draw(result, arguments.results.parent / "images" / "demo.png")


def markdown(result: dict[str, Any]) -> str:
    """Rows of models, columns of scores, as mean ± sample standard deviation."""
    lines = ["| model | parameters | " + " | ".join(NUMBERS) + " |", "| --- |" + " ---: |" * (len(NUMBERS) + 1)]
    for name, scores in result["scores"].items():
        cells = [
            f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
            for values in scores.values()
        ]
        lines.append(f"| {_label(name)} | {result['parameters'][name]:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of the means, a dot for each seed."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    labels = ("mean R@1", "zero-shot")
    names = [name for name in ("teacher", "clip_kd", "hinton", "contrastive") if name in result["scores"]]
    colours = {"teacher": "#9aa5b1", "clip_kd": "#1f6f5c", "hinton": "#5fa88f", "contrastive": "#d9a441"}
    figure, panels = plt.subplots(1, len(labels), figsize=(8, 2.6))
    for panel, label in zip(panels, labels, strict=True):
        for place, name in enumerate(reversed(names)):
            values = result["scores"][name][label]
            mean = statistics.mean(values)
            panel.barh(place, mean, color=colours[name], height=0.65)
            panel.plot(values, [place] * len(values), "o", color="black", markersize=3, alpha=0.7)
            panel.text(max(values) + 0.8, place, f"{mean:.1f}", va="center", fontsize=9)
        panel.set_yticks(range(len(names)))
        shown = [f"{_label(name)}\n{result['parameters'][name] / 1e6:.2f} M parameters" for name in reversed(names)]
        panel.set_yticklabels(shown if panel is panels[0] else [""] * len(names), fontsize=8)
        panel.set_title(f"{label} (%)", fontsize=10, loc="left")
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=160)


def _label(name: str) -> str:
    return {"teacher": "teacher", "contrastive": "student, scratch"}.get(name, f"student, {name}")


if __name__ == "__main__":
    main()

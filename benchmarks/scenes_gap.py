"""How far students trained alone on `scenes` end below the teacher: validation curves and test scores; JSON, table, figure.

    uv run cmapkd distill scenes_teacher --out runs/scenes_teacher
    uv run cmapkd distill contrastive_scenes student=tiny:base-32 training.steps=4000 training.evaluate_every=500 --out runs/gap_base-32
    uv run --group bench python benchmarks/scenes_gap.py runs/scenes_teacher runs/gap_base-32 runs/gap_small-32

The first run folder is the teacher's; each student is named by its folder.
"""  # noqa: E501  the command is one line

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from cmapkd.provenance import describe_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    models = [read(run) for run in arguments.runs]
    result = {"models": models, "environment": describe_environment()}
    (arguments.results / "scenes_gap.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(markdown(models))
    draw(models, arguments.results.parent / "images" / "scenes_gap.png")


def read(run: Path) -> dict[str, Any]:
    """Settings, curve and final scores of a finished or stopped run."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    batch_size = config["training"]["batch_size"]
    curve = {line["step"] * batch_size: line["validation/mean_r@1"] for line in lines if "validation/mean_r@1" in line}
    done = run / "metrics.json"
    metrics = json.loads(done.read_text(encoding="utf-8")) if done.exists() else {}
    steps = config["training"]["steps"]
    return {
        "name": run.name.removeprefix("gap_"),
        "student": config["student"],
        "planned_pairs": steps * batch_size,
        "trained_pairs": max(line["step"] for line in lines) * batch_size,
        "validation_r@1": curve,
        "test": metrics.get("student"),
    }


def markdown(models: list[dict[str, Any]]) -> str:
    """A row for each model; the gap is of mean R@1 on the test split."""
    rows = [
        "| model | parameters | pairs | test R@1 | below the teacher | last validation gains |",
        "| --- |" + " ---: |" * 5,
    ]
    teacher = models[0]["test"]["retrieval"]["mean_r@1"]
    for model in models:
        curve = [*model["validation_r@1"].values()]
        gains = ", ".join(f"{after - before:+.1f}" for before, after in zip(curve[-4:], curve[-3:], strict=False))
        if model["test"] is None:
            rows.append(f"| {model['name']} | | {model['trained_pairs']:,} (stopped) | | | {gains} |")
            continue
        score = model["test"]["retrieval"]["mean_r@1"]
        rows.append(
            f"| {model['name']} | {model['test']['params']:,} | {model['trained_pairs']:,} | {score:.1f} | "
            f"{teacher - score:.1f} | {gains} |"
        )
    return "\n".join(rows)


def draw(models: list[dict[str, Any]], path: Path) -> None:
    """Validation R@1 over pairs seen."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 3.4))
    colours = ["#333f4c", "#1f6f5c", "#d9a441", "#5fa88f", "#b5533c"]
    for model, colour in zip(models, colours, strict=False):
        pairs, scores = [n / 1e6 for n in model["validation_r@1"]], [*model["validation_r@1"].values()]
        panel.plot(pairs, scores, color=colour, marker="o", markersize=3)
        panel.annotate(
            model["name"], (pairs[-1], scores[-1]), xytext=(5, -3), textcoords="offset points", color=colour, fontsize=9
        )
    panel.set_xlabel("training pairs (million)")
    panel.set_ylabel("validation R@1 (%)")
    panel.set_ylim(bottom=0)
    panel.margins(x=0.02)
    panel.set_xlim(right=panel.get_xlim()[1] * 1.15)
    panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()

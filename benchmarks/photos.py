"""Teacher, scratch student and distilled students on photographs: equal steps, several seeds, one table.

    uv run python benchmarks/photos.py flickr8k        # examples/flickr8k_teacher.yaml, examples/flickr8k.yaml
    uv run python benchmarks/photos.py nlvr

Runs that are finished are read back, interrupted ones go on. Writes docs/results/NAME.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from cmapkd import distill
from cmapkd.provenance import describe_environment
from cmapkd.results import RunResult

METHODS = ("contrastive", "hinton", "clip_kd")
NUMBERS = {
    "i2t R@1": ("i2t", "r@1"),
    "i2t R@5": ("i2t", "r@5"),
    "i2t R@10": ("i2t", "r@10"),
    "t2i R@1": ("t2i", "r@1"),
    "t2i R@5": ("t2i", "r@5"),
    "t2i R@10": ("t2i", "r@10"),
    "i2t median rank": ("i2t", "median_rank"),
    "t2i median rank": ("t2i", "median_rank"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("flickr8k", "nlvr"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    name, runs = arguments.name, arguments.runs
    teacher = finished(f"examples/{name}_teacher.yaml", out=runs / f"{name}_teacher")
    students: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for seed in arguments.seeds:
        for method in METHODS:
            metrics = finished(f"examples/{name}.yaml", out=runs / name / f"{method}-{seed}", method=method, seed=seed)
            students[method].append(metrics["student"])
            seconds[method].append(metrics["train_seconds"])
    scores = {"teacher": [teacher["student"]], **students}
    table = {
        method: {label: summary([dig(score["retrieval"], path) for score in done]) for label, path in NUMBERS.items()}
        for method, done in scores.items()
    }
    result = {
        "data": name,
        "seeds": arguments.seeds,
        "parameters": {method: done[0]["params"] for method, done in scores.items()},
        "images": teacher["student"]["retrieval"]["num_images"],
        "captions": teacher["student"]["retrieval"]["num_texts"],
        "steps": {"teacher": teacher["steps"], "students": metrics["steps"]},
        "batch_size": metrics["batch_size"],
        "train_seconds": {method: [round(value) for value in values] for method, values in seconds.items()},
        "mean_and_deviation": table,
        "environment": describe_environment(),
    }
    target = Path("docs/results") / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(markdown(table, result["parameters"]))


def finished(recipe: str, *, out: Path, **settings: Any) -> dict[str, Any]:
    """The metrics of a run: read if it is done, resumed if it was interrupted, started otherwise."""
    if not (out / "metrics.json").exists():
        distill(recipe, out=out, resume=(out / "config.yaml").exists(), **settings)
    return RunResult.read(out).metrics


def summary(values: list[float]) -> list[float | None]:
    """Mean and sample standard deviation (none for a single value)."""
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]


def markdown(table: dict[str, dict[str, list[float | None]]], parameters: dict[str, int]) -> str:
    """Rows of models, columns of scores, as mean ± deviation."""
    lines = ["| model | parameters | " + " | ".join(NUMBERS) + " |", "| --- |" + " ---: |" * (len(NUMBERS) + 1)]
    for method, row in table.items():
        cells = [f"{mean:.1f}" + (f" ± {spread:.1f}" if spread is not None else "") for mean, spread in row.values()]
        label = {"teacher": "teacher", "contrastive": "student, scratch"}.get(method, f"student, `{method}`")
        lines.append(f"| {label} | {parameters[method]:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dig(values: Any, path: tuple[str, ...]) -> float:
    """The number at `path` of nested scores."""
    for key in path:
        values = values[key]
    return float(values)


if __name__ == "__main__":
    main()

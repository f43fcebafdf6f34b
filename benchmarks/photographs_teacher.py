"""The teacher for photographs: trains it from its recipe, or reads a finished run back, and writes down its scores.

    uv run --group pretrained python benchmarks/pretrained_parts.py parts
    uv run python benchmarks/photographs_teacher.py --out runs/photographs_teacher

Scores are of Flickr8k's dev split, with all five captions of each picture. Its test split is not read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cmapkd import distill
from cmapkd.provenance import describe_environment

RECIPE = "examples/photographs_teacher.yaml"
JSON = Path("docs/results/photographs_teacher.json")
COMMANDS = (
    "uv run --group pretrained python benchmarks/pretrained_parts.py parts",
    f"uv run cmapkd distill {RECIPE} --out runs/photographs_teacher",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--json", type=Path, default=JSON)
    arguments = parser.parse_args()
    if not (arguments.out / "metrics.json").is_file():
        distill(recipe=RECIPE, out=arguments.out, resume=(arguments.out / "config.yaml").is_file())
    metrics: dict[str, Any] = json.loads((arguments.out / "metrics.json").read_text(encoding="utf-8"))
    environment = arguments.out / "environment.json"
    result = {
        "recipe": RECIPE,
        "commands": COMMANDS,
        "seed": metrics["seed"],
        "steps": metrics["steps"],
        "batch_size": metrics["batch_size"],
        "train_seconds": metrics["train_seconds"],
        "retrieval": metrics["student"]["retrieval"],
        "params": metrics["student"]["params"],
        "environment": json.loads(environment.read_text(encoding="utf-8"))
        if environment.is_file()
        else describe_environment(),
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["retrieval"], indent=2))


if __name__ == "__main__":
    main()

"""Puts a trained teacher into the package: half-precision weights, its tokenizer, and its scores on every split.

uv run cmapkd distill scenes_teacher --out runs/scenes_teacher
uv run python benchmarks/package_teacher.py runs/scenes_teacher tiny:scenes-teacher
uv run cmapkd distill sft_scenes_teacher --out runs/sft_scenes_teacher
uv run python benchmarks/package_teacher.py runs/sft_scenes_teacher tiny_vlm:scenes-teacher
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from cmapkd.data.open import open_source
from cmapkd.evaluation.headline import headlines
from cmapkd.evaluation.run import EvaluationConfig, evaluate
from cmapkd.models import load_model
from cmapkd.models.packaged import packaged_folder
from cmapkd.models.storage import DESCRIPTION

TARGET = Path(__file__).parents[1] / "src" / "cmapkd" / "weights"


def main(run: Path, name: str) -> None:
    target = TARGET / packaged_folder(name)
    load_model(run).half().save(target)
    description = json.loads((target / DESCRIPTION).read_text(encoding="utf-8"))
    description["name"] = name
    (target / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    model = load_model(target)  # what is shipped is what is scored
    scores = {
        split: evaluate(model, open_source(f"scenes@{split}"), EvaluationConfig(), device=torch.device("cpu"))
        for split in ("val", "test", "ood")
    }
    (target / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    for split, score in scores.items():
        told = (f"{headline.label} {number:.1f}" for headline, number in headlines(score).values())
        print(split, "  ".join(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

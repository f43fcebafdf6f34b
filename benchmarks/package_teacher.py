"""Puts a trained teacher into the package: half-precision weights, its tokenizer, and its scores on every split.

uv run cmapkd distill scenes_teacher --out runs/scenes_teacher
uv run python benchmarks/package_teacher.py runs/scenes_teacher scenes-teacher
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cmapkd import load
from cmapkd.data.open import open_source
from cmapkd.evaluation.run import evaluate
from cmapkd.models.storage import DESCRIPTION, WEIGHTS

TARGET = Path(__file__).parents[1] / "src" / "cmapkd" / "weights"


def main(run: Path, name: str) -> None:
    target = TARGET / name
    load(run).save(target)
    weights = {key: tensor.half() for key, tensor in load_file(target / WEIGHTS).items()}
    save_file(weights, target / WEIGHTS)
    description = json.loads((target / DESCRIPTION).read_text(encoding="utf-8"))
    description["name"] = f"tiny:{name}"
    (target / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    model = load(target)  # what is shipped is what is scored
    scores = {
        split: evaluate(model, open_source(f"scenes@{split}"), device=torch.device("cpu"))
        for split in ("val", "test", "ood")
    }
    (target / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    for split, score in scores.items():
        print(split, f"R@1 {score['retrieval']['mean_r@1']:.1f}  zero-shot {score['zero_shot']['top1']:.1f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

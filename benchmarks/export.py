"""What ONNX files keep: the packaged teacher in every precision, and small random models of every family.

    uv run python benchmarks/export.py --json docs/results/export.json
    uv run python benchmarks/export.py --json docs/results/export.json --only embeddings "open_clip, pruned"
    uv run cmapkd distill student.yaml --out runs/photo          # the recipe is in docs/export.md
    uv run python benchmarks/export.py --json docs/results/export.json --photographs runs/photo \\
      'webdataset:../shared/data/flickr8k/dev-*.tar' 'webdataset:../shared/data/flickr8k/train-*.tar'

The teacher's files are scored on the validation split of `scenes`, and calibrated on its training split. The families'
models are those of the tests (tests/export/export_support.py); random weights say whether a file computes the same,
and not what int8 costs a trained model. `embeddings` are the teacher's on its validation split, stored in fewer bytes,
with a rotation measured on the training split.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from cmapkd.api import load
from cmapkd.data.open import open_source
from cmapkd.data.types import Source
from cmapkd.evaluation.embed import embed
from cmapkd.evaluation.headline import headlines
from cmapkd.export.narrow import rotation_of
from cmapkd.export.origin import Origin
from cmapkd.export.precision import PRECISIONS
from cmapkd.export.stored import stored_rows
from cmapkd.export.write import export_onnx
from cmapkd.models import DualEncoder
from cmapkd.provenance import describe_environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "export"))
from export_support import EXPORTED, made


def add_photographs(model: str, val: str, train: str, path: Path) -> None:
    """Rows of a model of photographs, into a file that is there."""
    results = json.loads(path.read_text(encoding="utf-8"))
    calibration = open_source(train, split="train")
    with tempfile.TemporaryDirectory() as place:
        data = open_source(val, split="val")
        results["photographs"] = measured(load(model), Path(place, "out"), data=data, calibration=calibration)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measured(
    model: DualEncoder, out: Path, *, calibration: Source | None = None, data: Source | None = None
) -> dict[str, Any]:
    """By precision: lowest cosine and largest noise of both towers, bytes, milliseconds, scores."""
    calibration = calibration or open_source("scenes?length=64", split="train")
    every = tuple(PRECISIONS)
    settings: dict[str, Any] = {"precisions": every, "calibration": calibration, "data": data, "accept_loss": 60}
    parity = export_onnx(model, out, origin=Origin(model.name), **settings)
    found: dict[str, Any] = {}
    for name in every:
        rows = {row["tower"].removesuffix("_model"): row for row in parity["files"] if row["precision"] == name}
        found[name] = {
            "cosine_min": min(row["cosine_min"] for row in rows.values()),
            "one_minus_cosine": max(1 - row["cosine_min"] for row in rows.values()),
            "largest_error": max(row["largest_error"] for row in rows.values()),
            "noise_to_spread": max(row["noise_to_spread"] for row in rows.values()),
            "bytes": {tower: row["bytes"] for tower, row in rows.items()},
            "milliseconds": {tower: row["milliseconds"] for tower, row in rows.items()},
        }
    for name, scores in (parity["scores"] or {}).items():
        found.setdefault(name, {})["scores"] = {task: number for task, (_, number) in headlines(scores).items()} | {
            "recall@1": scores["retrieval"]["mean_r@1"]
        }
    return found


def smaller(model: DualEncoder, val: Source, train: Source) -> dict[str, Any]:
    """By width and form of storing: bytes of a vector, and R@1."""
    found = embed(model, val, batch_size=64, device="cpu")
    rows = stored_rows(found, rotation_of(model, train))
    for row in rows:
        print(row, flush=True)
    return {f"{row['width']}{', rotated' if row['rotated'] else ''}": row["forms"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--only", nargs="+", choices=["teacher", "embeddings", *EXPORTED], help="Measures these again.")
    parser.add_argument("--photographs", nargs=3, metavar=("MODEL", "VAL", "TRAIN"), help="Adds one model's rows.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.photographs is not None:
        add_photographs(*arguments.photographs, arguments.json)
        return
    parts = arguments.only or ["teacher", "embeddings", *EXPORTED]
    kept = arguments.json is not None and arguments.only
    results: dict[str, Any] = json.loads(arguments.json.read_text(encoding="utf-8")) if kept else {"families": {}}
    val, teacher = open_source("scenes", split="val"), load("tiny:scenes-teacher")
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        if "teacher" in parts:
            results["teacher"] = measured(teacher, base / "teacher", data=val)
        if "embeddings" in parts:
            results["embeddings"] = smaller(teacher, val, open_source("scenes", split="train"))
        for number, name in enumerate(each for each in EXPORTED if each in parts):
            results["families"][name] = measured(made(name, base / f"made{number}"), base / f"out{number}")
            print(name, {each: row["cosine_min"] for each, row in results["families"][name].items()}, flush=True)
    environment = describe_environment()
    results |= (
        {"measured_again": {"parts": parts, "environment": environment}} if kept else {"environment": environment}
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

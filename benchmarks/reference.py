"""The reference recipes at their true sizes: ViT-L/14 teaches ViT-B/16 and ResNet-50 at 224 px, on data made here.

    uv run python benchmarks/reference.py --threads 1 --json docs/results/reference.json

Each recipe is run as a user runs it, `cmapkd distill`, in a process of its own, with random weights (only sizes count
here), a small batch and a few steps: for the COCO recipes some in each of their stages. Reported: seconds a step (the
median after the first of each stage), the process's peak resident memory, and that losses are finite.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from cmapkd.config.load import load_mapping
from cmapkd.provenance import describe_environment

RECIPES = ("cmapkd_coco", "cmapkd_coco_rn50", "cmapkd_cc3m", "cmapkd_cc3m_rn50")
WORDS = [
    "a",
    "photo",
    "of",
    "two",
    "red",
    "dogs",
    "and",
    "one",
    "green",
    "boat",
    "near",
    "the",
    "old",
    "house",
    "under",
    "some",
    "tall",
    "trees",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="in each stage")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = {"coco": write_coco(folder, 4 * arguments.batch), "cc3m": write_shards(folder, 4 * arguments.batch)}
        for recipe in arguments.recipes:
            rows.append(take_steps(recipe, sources[recipe.split("_")[1]], folder / recipe, arguments))
            print(rows[-1], flush=True)
    settings = {key: getattr(arguments, key) for key in ("batch", "steps", "precision", "threads")}
    result = {"settings": settings, "rows": rows, "environment": describe_environment()}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def take_steps(recipe: str, source: str, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One recipe, with only what this machine cannot have replaced: weights, data, batch and length."""
    stages = load_mapping(recipe).get("training", {}).get("stages") or []
    cut = [
        {key: value for key, value in stage.items() if key != "epochs"} | {"steps": arguments.steps} for stage in stages
    ]
    settings = {
        "teacher": "open_clip:ViT-L-14",
        "data.train": source,
        "data.val": None,
        "data.workers": 0,
        "training.batch_size": arguments.batch,
        "training.precision": arguments.precision,
        "training.evaluate_every": None,
        "training.epochs": None,
        "training.stages": cut,
        "training.steps": None if cut else arguments.steps,
        "training.log_every": 1,
        "optim.warmup_steps": 1,
    }
    command = [sys.executable, "-m", "cmapkd", "distill", recipe, "--out", str(out)]
    command += [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for key, value in settings.items()
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        said = process.stderr.read().decode()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{recipe} ended with {process.returncode}:\n{said}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    if not all(math.isfinite(line["loss"]) for line in lines):
        raise SystemExit(f"{recipe}: a loss is not finite: {[line['loss'] for line in lines]}")
    seconds = [arguments.batch / line["pairs_per_second"] for line in lines]
    names = [stage["name"] for stage in stages] or ["whole"]
    measured = json.loads((out / "metrics.json").read_text())
    return {
        "recipe": recipe,
        "student_parameters": measured["student"]["params"],
        "teacher_parameters": measured["teacher"]["params"],
        "extra_parameters": measured["extra_params"],
        "step_seconds": {
            name: round(statistics.median(seconds[number * arguments.steps + 1 : (number + 1) * arguments.steps]), 2)
            for number, name in enumerate(names)
        },
        "losses": [round(line["loss"], 3) for line in lines],
        "peak_mib": round(used.ru_maxrss / 1024),
    }


def write_coco(folder: Path, count: int) -> str:
    """Pictures and a captions file as COCO 2017 has them, five captions a picture."""
    images = folder / "coco"
    images.mkdir()
    records: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for number in range(count):
        name = f"{number:012d}.jpg"
        (images / name).write_bytes(picture(number))
        records["images"].append({"id": number, "file_name": name, "width": 320, "height": 240})
        for each in range(5):
            entry = {"id": 5 * number + each, "image_id": number, "caption": caption(5 * number + each)}
            records["annotations"].append(entry)
    (folder / "captions.json").write_text(json.dumps(records))
    return f"coco:{folder / 'captions.json'},{images}"


def write_shards(folder: Path, count: int) -> str:
    """Two tar shards as CC3M is usually kept: a picture and its text under one key."""
    for shard in range(2):
        with tarfile.open(folder / f"cc3m-train-{shard:04d}.tar", "w") as archive:
            for number in range(shard, count, 2):
                for suffix, content in (("jpg", picture(number)), ("txt", caption(number).encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return f"webdataset:{folder}/cc3m-train-*.tar"


def picture(number: int) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def caption(number: int) -> str:
    return " ".join(np.random.default_rng(number).choice(WORDS, 8))


if __name__ == "__main__":
    main()

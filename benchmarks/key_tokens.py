"""What a row of the cache holds against what the student learns from it: R@1 and bytes for each kind, paired by seed.

    uv run python benchmarks/key_tokens.py --json docs/results/key_tokens.json --folder runs/key_tokens

One dense cache of the teacher is built; every arm reads from it what its own rows would hold (a test shows that the
losses are the same), in the same order of samples and with the same initial student for a seed. `global int8` has a
cache of its own, and is what rounding costs a student. R@1 is that of the validation split, mean of both directions.
A line is written after each run, and what is in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from cmapkd.api import distill
from cmapkd.config import load_mapping
from cmapkd.data.open import open_source
from cmapkd.methods import build_method
from cmapkd.models import FrozenTeacher, build_model
from cmapkd.provenance import describe_environment
from cmapkd.run import RunConfig, plan_cache, vocabulary_captions

TOP = {"visual_levels": {"P5": 1.0}, "language_levels": {"L4": 1.0}}
ARMS: dict[str, dict[str, Any]] = {
    "global": TOP,
    "global int8": TOP,
    "pooled": {"places": "pooled"},
    **{f"{k} key tokens": {"places": "key_tokens", "key_tokens": k} for k in (4, 8, 16, 32)},
    "dense": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="tiny:small-32")
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS])
    parser.add_argument("--folder", type=Path, required=True, help="for caches and runs")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    settings = {key: getattr(arguments, key) for key in ("student", "samples", "steps")}
    result = {"settings": settings, "bytes_per_row": {}, "runs": [], "environment": describe_environment()}
    if arguments.json.exists():
        result["runs"] = json.loads(arguments.json.read_text())["runs"]
    result["bytes_per_row"] = {arm: bytes_of(arm, arguments) for arm in ARMS}
    done = {(run["arm"], run["seed"]) for run in result["runs"]}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            if (arm, seed) in done:
                continue
            start = time.perf_counter()
            out = arguments.folder / f"{arm.replace(' ', '-')}-{seed}"
            found = distill("cmapkd_scenes", out=out, quiet=True, **recipe(arm, seed, arguments))
            retrieval, zero_shot = found.metrics["student"]["retrieval"], found.metrics["student"]["zero_shot"]
            scores = {
                "r@1": retrieval["mean_r@1"],
                **{way: retrieval[way]["r@1"] for way in ("i2t", "t2i")},
                "zero_shot": zero_shot["top1"],
            }
            result["runs"].append(
                {"arm": arm, "seed": seed, **scores, "seconds": round(time.perf_counter() - start, 1)}
            )
            arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(arm, seed, scores, flush=True)


def recipe(arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Sections over the packaged recipe."""
    quantised = arm == "global int8"
    return {
        "student": arguments.student,
        "method": {"name": "cmapkd", **ARMS[arm]},
        "data": {
            "train": f"scenes?length={arguments.samples}",
            "test": None,
            "views": {"crop_scale": [1.0, 1.0], "num_views": 2},
        },
        "training": {"steps": arguments.steps, "batch_size": 256, "checkpoint_every": arguments.steps},
        "baseline": "none",
        "cache": {
            "mode": "auto",
            "folder": str(arguments.folder / ("cache-int8" if quantised else "cache-dense")),
            "kind": "global" if quantised else "dense",
            "store": "int8" if quantised else "fp16",
        },
        "seed": seed,
    }


def bytes_of(arm: str, arguments: argparse.Namespace) -> int:
    """Of a row of the arm's own kind."""
    values = {"base": "cmapkd_scenes", **recipe(arm, 0, arguments)}
    values["cache"] = {"mode": "auto", "store": values["cache"]["store"]}
    config = RunConfig.from_mapping(merged(values))
    source = open_source(config.data.train, split="train", require_captions=True)
    assert config.teacher is not None
    student = build_model(config.student, captions=vocabulary_captions(source))
    method = build_method(config.method, student=student, teacher=FrozenTeacher(build_model(config.teacher)))
    return plan_cache(config, method, source).layout.row_bytes


def merged(values: dict[str, Any]) -> dict[str, Any]:
    from cmapkd.config import merge_mappings

    return merge_mappings(load_mapping(values.pop("base")), values)


if __name__ == "__main__":
    main()

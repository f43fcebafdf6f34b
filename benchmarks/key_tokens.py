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
from functools import cache
from pathlib import Path
from typing import Any

import cmapkd.run.build
import cmapkd.run.measure
from cmapkd.cache import CacheConfig
from cmapkd.config import load_mapping, merge_mappings
from cmapkd.data.open import open_source
from cmapkd.methods import build_method
from cmapkd.models import FrozenTeacher, build_model
from cmapkd.provenance import describe_environment
from cmapkd.run import RunConfig, plan_cache, run, vocabulary_captions

TOP = {"visual_levels": {"P5": 1.0}, "language_levels": {"L4": 1.0}}
ARMS: dict[str, dict[str, Any]] = {
    "global": TOP,
    "global int8": TOP,
    "pooled": {"places": "pooled"},
    "global, 1024 of the bank": {**TOP, "bank": {"sample": 1024}},
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
    done = {(each["arm"], each["seed"]) for each in result["runs"]}
    teacher: dict[str, Any] | None = None
    cmapkd.run.build.open_source = cmapkd.run.measure.open_source = kept
    for seed in arguments.seeds:
        for arm in arguments.arms:
            if (arm, seed) in done:
                continue
            start = time.perf_counter()
            out = arguments.folder / f"{arm.replace(' ', '-')}-{seed}"
            metrics = run(config_of(arm, seed, arguments), out=out, teacher_scores=teacher).metrics
            teacher = metrics["teacher"]
            retrieval, zero_shot = metrics["student"]["retrieval"], metrics["student"]["zero_shot"]
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
    config = config_of(arm, 0, arguments)
    assert config.cache is not None
    own = CacheConfig(store=config.cache.store)
    config = config.model_copy(update={"cache": own})
    source = open_source(config.data.train, split="train", require_captions=True)
    assert config.teacher is not None
    student = build_model(config.student, captions=vocabulary_captions(source))
    method = build_method(config.method, student=student, teacher=FrozenTeacher(build_model(config.teacher)))
    return plan_cache(config, method, source).layout.row_bytes


def config_of(arm: str, seed: int, arguments: argparse.Namespace) -> RunConfig:
    return RunConfig.from_mapping(merge_mappings(load_mapping("cmapkd_scenes"), recipe(arm, seed, arguments)))


class Kept:
    """A source whose samples are made once and stay in memory: drawing them would be most of a run's time."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.samples: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        if index not in self.samples:
            self.samples[index] = self.source[index]
        return self.samples[index]


@cache
def kept(name: str, **options: Any) -> Any:
    return Kept(open_source(name, **options))


if __name__ == "__main__":
    main()

"""Frozen towers and frozen blocks: a step with live towers against a step with their answers from the cache.

    uv run python benchmarks/frozen_towers.py examples/photographs_teacher.yaml --folder runs/frozen_towers \\
        --name heads training.batch_size=64
    uv run python benchmarks/frozen_towers.py examples/photographs_teacher.yaml --folder runs/frozen_blocks \\
        --name last_blocks training.batch_size=64 training.train_parts=null \\
        student.options.image.frozen_blocks=4 student.options.text.frozen_blocks=4

Each command replaces its entry of docs/results/frozen_towers.json. All its trainings have the same seed, data, views
and batches, and their losses are compared. Seconds are of whole steps, the data included, from the pairs a second that
the trainer logs; the first step is left out. What the cached steps read is stored before and timed apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from cmapkd.config import load_config
from cmapkd.provenance import describe_environment
from cmapkd.run import RunConfig
from cmapkd.run.measure import Measured
from cmapkd.run.train import train

JSON = Path("docs/results/frozen_towers.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="key=value over the recipe")
    parser.add_argument("--live-steps", type=int, default=4)
    parser.add_argument("--cached-steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, required=True, help="for the runs; empty or new")
    parser.add_argument("--name", required=True, help="of the entry")
    parser.add_argument("--stored", action="store_true", help="an earlier command has stored what is read")
    parser.add_argument("--shared", action="store_true", help="say that other work shared the cores")
    parser.add_argument("--json", type=Path, default=JSON)
    arguments = parser.parse_intermixed_args()
    few, many = arguments.live_steps, arguments.cached_steps
    start = time.perf_counter()
    stored = steps(arguments, "build", many)  # stores what the cached steps read
    build = time.perf_counter() - start
    runs = {
        "live": steps(arguments, "live", few, cached=False),
        "short": steps(arguments, "short", few),
        "cached": steps(arguments, "cached", many),
    }
    assert [line["loss"] for line in stored] == [line["loss"] for line in runs["cached"]]
    batch = config_of(arguments, few, cached=True).training.batch_size
    seconds = {
        name: statistics.median(batch / line["pairs_per_second"] for line in runs[name][1:])
        for name in ("live", "cached")
    }
    pairs = zip(runs["live"], runs["short"], strict=True)
    result: dict[str, Any] = {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "batch_size": batch,
        "steps": {"live": few, "cached": many},
        "seconds_a_step": seconds,
        "ratio": seconds["live"] / seconds["cached"],
        "largest_difference_of_losses": max(abs(live["loss"] - cached["loss"]) for live, cached in pairs),
        "seconds_with_storing": None if arguments.stored else build,
        "other_work_shared_the_cores": arguments.shared,
        "environment": describe_environment(),
    }
    known = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.is_file() else {}
    arguments.json.write_text(json.dumps({**known, arguments.name: result}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def steps(arguments: argparse.Namespace, name: str, count: int, *, cached: bool = True) -> list[dict[str, float]]:
    """What a training of `count` steps logged."""
    out = arguments.folder / name
    out.mkdir(parents=True)
    config = config_of(arguments, count, cached=cached)
    train(config, Measured.open(config), out=out, resume=False, console=None, title=name)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def config_of(arguments: argparse.Namespace, count: int, *, cached: bool) -> RunConfig:
    changes = [f"training.steps={count}", "training.epochs=null", "training.log_every=1", "data.val=null"]
    off = [] if cached else ["cache=off"]
    return load_config(RunConfig, arguments.recipe, [*arguments.overrides, *changes, *off])


if __name__ == "__main__":
    main()

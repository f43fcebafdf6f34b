"""Steps on one CPU core while freed memory stays with the process, and while glibc gives it back.

    uv run python benchmarks/freed_memory.py --json docs/results/freed_memory.json

`cmapkd.freed_memory` is what is measured. Weights of the timm and open_clip students are random, pictures are noise.
Each arm is a process, and arms take turns. Times are the process's own CPU seconds, the kernel's apart: other work on
the machine counts little. Peak memory is the most that was resident.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

PAIRS: dict[str, dict[str, Any]] = {
    "tiny:large, 64 px": {
        "student": "tiny:scenes-teacher",
        "teacher": "tiny:scenes-teacher",
        "batch": 128,
        "steps": 12,
    },
    "EfficientNet-Lite0, 224 px": {
        "student": "timm:tf_efficientnet_lite0",
        "teacher": "tiny:scenes-teacher",
        "batch": 32,
        "steps": 4,
    },
    "ViT-B/32, 224 px": {"student": "open_clip:ViT-B-32", "teacher": "tiny:scenes-teacher", "batch": 16, "steps": 3},
}
ARMS = ("given back", "kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)  # pair, arm: a child's
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(*arguments.arm)))
        return
    from cmapkd.provenance import describe_environment

    rows = [
        {"pair": pair, "arm": arm, **child(pair, arm)}
        for _ in range(arguments.rounds)
        for pair in PAIRS
        for arm in ARMS
    ]
    pairs = {pair: summary([row for row in rows if row["pair"] == pair]) for pair in PAIRS}
    environment = {key: value for key, value in describe_environment().items() if key != "command"}
    result = {"settings": PAIRS, "pairs": pairs, "rounds": rows, "environment": environment}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(pairs, indent=1))


def child(pair: str, arm: str) -> dict[str, float]:
    """What a process of its own measured."""
    plain = {name: text for name, text in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, __file__, "--json", "none", "--arm", pair, arm]
    done = subprocess.run(command, env=plain | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(pair, arm, found, file=sys.stderr)
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios of the two arms."""
    found: dict[str, Any] = {
        arm: {
            key: statistics.median(row[key] for row in rows if row["arm"] == arm)
            for key in ("user", "kernel", "peak_mib")
        }
        for arm in ARMS
    }
    back, kept = (found[arm] for arm in ARMS)
    found["time_ratio"] = (kept["user"] + kept["kernel"]) / (back["user"] + back["kernel"])
    found["peak_ratio"] = kept["peak_mib"] / back["peak_mib"]
    return found


def measure(pair: str, arm: str) -> dict[str, float]:
    """CPU seconds of a step, and the process's peak, in this process."""
    from cmapkd.freed_memory import keep_freed_memory

    if arm == "kept" and not keep_freed_memory():
        raise SystemExit("this C library cannot be told to keep freed memory: only glibc can")
    import numpy as np
    import torch
    from PIL import Image

    import cmapkd

    told = PAIRS[pair]
    torch.set_num_threads(1)
    kd = cmapkd.method("clip_kd", student=told["student"], teacher=told["teacher"])
    optimizer = torch.optim.AdamW(kd.parameters(), lr=1e-4)
    draws = np.random.default_rng(0)
    images = [Image.fromarray(draws.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for _ in range(told["batch"])]
    texts = [f"a picture of thing number {number}" for number in range(told["batch"])]
    before = None
    for step in range(told["steps"] + 2):
        if step == 2:
            before = resource.getrusage(resource.RUSAGE_SELF)
        loss = kd(images, texts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kd.after_step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert before is not None
    return {
        "user": (after.ru_utime - before.ru_utime) / told["steps"],
        "kernel": (after.ru_stime - before.ru_stime) / told["steps"],
        "peak_mib": after.ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main()

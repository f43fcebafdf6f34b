"""Seconds that a checkpoint takes for each gigabyte: `python benchmarks/checkpoint_seconds.py --json FILE`.

Random weights with AdamW's two averages are written as the trainer writes them, with checksums and flushes, and read
back. The disk is that of the temporary folder. CPU time is of the process, without the system's own writing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cmapkd.training.checkpoint import Progress, read_checkpoint, write_checkpoint


def measure(gigabytes: float, rounds: int) -> dict[str, Any]:
    """Medians, in seconds for each 10^9 bytes."""
    count, side = max(1, round(gigabytes * 1e9 / 12 / 2**20)), 1024
    draws = torch.Generator().manual_seed(0)
    weights = {f"block.{number}": torch.randn(side, side, generator=draws) for number in range(count)}
    averages = {f"{kind}.{name}": value * 0.1 for kind in ("first", "second") for name, value in weights.items()}
    written = 12 * count * side**2 / 1e9
    found: dict[str, list[float]] = {f"{what}_{clock}": [] for what in ("write", "read") for clock in ("cpu", "wall")}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1 + rounds):
            path = Path(folder) / f"step-{number}"
            for what in ("write", "read"):
                cpu, wall = time.process_time(), time.perf_counter()
                if what == "write":
                    write_checkpoint(path, {"method": weights, "optimizer": averages}, Progress(total=rounds))
                else:
                    read_checkpoint(path)
                if number:
                    found[f"{what}_cpu"].append((time.process_time() - cpu) / written)
                    found[f"{what}_wall"].append((time.perf_counter() - wall) / written)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from cmapkd.provenance import describe_environment

    result = {
        "gigabytes": arguments.gigabytes,
        "rounds": arguments.rounds,
        "seconds_per_gigabyte": measure(arguments.gigabytes, arguments.rounds),
        "environment": describe_environment(),
    }
    text = json.dumps(result, indent=2)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

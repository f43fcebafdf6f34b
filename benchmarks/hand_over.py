"""What it costs to hand pictures over from a data worker: `python benchmarks/hand_over.py --json out.json`.

The pictures of a batch lie ready in a worker, which stacks them and sends them through shared memory. The main process
copies each batch to one place, as it does for a device. Counted is the CPU time of both processes. The two arms, pixels
in bytes and in float32, take turns, each round in new workers. A third number is the normalisation that each arm needs
on a CPU: of one picture in the worker, or of the batch where the model computes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cmapkd.data.workers import ReadAhead
from cmapkd.models import ImageSpec
from retrieval import processor

WARM = 2  # batches of a round before its clock starts


class Ready(Dataset[tuple[Tensor, float]]):
    """The same pictures in every place; beside them, the CPU seconds of the worker until the place before was sent."""

    def __init__(self, pictures: list[Tensor]) -> None:
        self.pictures = pictures

    def __getitem__(self, place: int) -> tuple[Tensor, float]:
        spent = time.process_time()
        return torch.stack(self.pictures), spent


def handed_over(pictures: list[Tensor], batches: int) -> dict[str, float]:
    """CPU milliseconds of a batch, in the worker and in the main process."""
    place = torch.empty(len(pictures), *pictures[0].shape, dtype=pictures[0].dtype)
    worker: list[float] = []
    start = 0.0
    for number, (images, spent) in enumerate(ReadAhead(Ready(pictures), range(WARM + batches + 1), workers=1)):
        worker.append(spent)
        if number == WARM:
            start = time.process_time()
        elif number > WARM:
            place.copy_(images)
            end = time.process_time()
        del images
    return {
        "worker": 1e3 * (worker[WARM + batches] - worker[WARM]) / batches,
        "main": 1e3 * (end - start) / batches,
    }


def normalising(spec: ImageSpec, raw: list[Tensor]) -> dict[str, float]:
    """CPU milliseconds of a batch: picture by picture, as workers did it, and of a whole batch."""
    start = time.process_time()
    for picture in raw:
        spec.to_model(picture)
    one_by_one = time.process_time() - start
    batch = torch.stack(raw)
    start = time.process_time()
    spec.to_model(batch)
    return {"one_by_one": 1e3 * one_by_one, "batch": 1e3 * (time.process_time() - start)}


def measure(size: int, pictures: int, batches: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, in CPU milliseconds of a batch."""
    spec, draws = ImageSpec(size), np.random.default_rng(0)
    shown = [Image.fromarray(draws.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(pictures)]
    raw = [spec.raw(picture) for picture in shown]
    arms = {"uint8": raw, "float32": [spec(picture) for picture in shown]}
    found: dict[str, list[dict[str, float]]] = {"uint8": [], "float32": [], "normalising": []}
    for _ in range(rounds):
        for name, items in arms.items():
            found[name].append(handed_over(items, batches))
        found["normalising"].append(normalising(spec, raw))
    ratios = [sum(u.values()) / sum(f.values()) for u, f in zip(found["uint8"], found["float32"], strict=True)]
    medians: dict[str, Any] = {
        name: {key: round(statistics.median(each[key] for each in values), 2) for key in values[0]}
        for name, values in found.items()
    }
    ratio = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    mib = {name: items[0].nbytes * pictures / 2**20 for name, items in arms.items()}
    return medians | {"ratio": {key: round(value, 3) for key, value in ratio.items()}, "mib": mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="side of a picture in pixels")
    parser.add_argument("--pictures", type=int, default=256, help="of a batch")
    parser.add_argument("--batches", type=int, default=6, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "size": options.size,
        "pictures": options.pictures,
        "batches": options.batches,
        "rounds": options.rounds,
        "unit": "CPU milliseconds of a batch",
        "torch": torch.__version__,
        "processor": processor(),
        **measure(options.size, options.pictures, options.batches, options.rounds),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What it costs to hand pictures over from a data worker: `python benchmarks/hand_over.py --json out.json`.

The pictures of a batch lie ready in a worker, which stacks them. The arms `float32` and `uint8` send them as torch's
`DataLoader` does: through shared memory that is new for each batch. The main process copies each batch to one place, as
it does for a device. The arm `ring` sends bytes through the slots of `ReadAhead`, which delivers a batch in memory of
its own. Counted is the CPU time of both processes. The arms take turns, each round in new workers.

`normalising` is the normalisation that a CPU needs: of one picture in the worker, or of the batch where the model
computes. `first_batch` is the time until the first batch of four workers comes: one of them makes it, as `DataLoader`
has it, or all together. The source sleeps while it reads, so that one core shows what several workers do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmapkd.data.loading import make_loader
from cmapkd.data.pieces import Part
from cmapkd.data.plans import Plan, PlanSampler
from cmapkd.data.ring import joined, stack
from cmapkd.data.types import Batch, ModelInput, TokenBatch
from cmapkd.data.workers import ReadAhead
from cmapkd.models import ImageSpec
from retrieval import processor

WARM = 2  # batches of a round before its clock starts
FIRST_WORKERS, FIRST_ROWS, FIRST_SECONDS = 4, 64, 0.3  # of `first_batch`: each reading sleeps so long


class Ready(Dataset[tuple[Tensor, float]]):
    """The same pictures in every place; beside them, the CPU seconds of the worker until the place before was sent."""

    def __init__(self, pictures: list[Tensor]) -> None:
        self.pictures = pictures

    def __getitem__(self, place: int) -> tuple[Tensor, float]:
        spent = time.process_time()
        return stack(self.pictures), spent


def as_before(dataset: Dataset[Any], places: Sequence[int], workers: int = 1) -> Iterable[Any]:
    """Items through torch's loader, as this project read them before it had a ring."""
    return DataLoader(
        dataset, sampler=places, batch_size=None, num_workers=workers, prefetch_factor=4, collate_fn=lambda made: made
    )


def handed_over(pictures: list[Tensor], batches: int, *, ring: bool) -> dict[str, float]:
    """CPU milliseconds of a batch, in the worker and in the main process."""
    dataset, places = Ready(pictures), range(WARM + batches + 1)
    size = len(pictures) * pictures[0].nbytes
    loader = ReadAhead(dataset, places, workers=1, item_bytes=size) if ring else as_before(dataset, places)
    place = torch.empty(len(pictures), *pictures[0].shape, dtype=pictures[0].dtype)
    worker: list[float] = []
    start = 0.0
    for number, (images, spent) in enumerate(loader):
        worker.append(spent)
        if number == WARM:
            start = time.process_time()
        elif number > WARM:
            if not ring:
                place.copy_(images)
            end = time.process_time()
        del images
    return {
        "worker": 1e3 * (worker[WARM + batches] - worker[WARM]) / batches,
        "main": 1e3 * (end - start) / batches,
    }


class Sleeping(Dataset[Batch]):
    """Batches of a source whose readings sleep."""

    source = range(10**6)

    def bytes_of(self, size: int) -> int:
        return size * 3 * 224**2

    def __getitem__(self, plan: Plan) -> Batch:
        return self.join(plan, [self.piece(plan, 0, len(plan.mine))])

    def piece(self, plan: Plan, first: int, last: int) -> Part:
        """Its first rows say when it began, and how many rows it has."""
        begun = time.monotonic()
        time.sleep(FIRST_SECONDS * (last - first))
        texts = TokenBatch(torch.zeros(last - first, 1).long(), torch.ones(last - first, 1).bool())
        pixels = stack([torch.zeros(3, 224, 224, dtype=torch.uint8)] * (last - first))
        ids = tuple(map(str, plan.mine[first:last]))
        return Part(ids, (begun,), {"student": ModelInput(pixels, texts)}, {}, {}, ())

    def join(self, plan: Plan, parts: Sequence[Part]) -> Batch:
        joined([part.inputs["student"].images for part in parts])  # type: ignore[attr-defined]
        about = {"begun": min(part.texts[0] for part in parts), "most": max(len(part.ids) for part in parts)}
        return Batch(tuple(map(str, plan.mine)), {}, (), extra=about)


def first_batch() -> dict[str, Any]:
    """Seconds from the first reading until the first batch comes, and the largest share that one worker made of it."""
    sampler = PlanSampler(10**6, batch_size=FIRST_ROWS, seed=0, start=0, stop=1)
    loaders = {
        "whole": iter(as_before(Sleeping(), [*sampler], FIRST_WORKERS)),  # type: ignore[arg-type]
        "pieces": make_loader(Sleeping(), sampler, workers=FIRST_WORKERS, pin_memory=False),
    }
    found = {}
    for name, loader in loaders.items():
        about = next(loader).extra
        found[name] = {"seconds": round(time.monotonic() - about["begun"], 2), "share": about["most"] / FIRST_ROWS}
    return found


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
    arms = {"ring": raw, "uint8": raw, "float32": [spec(picture) for picture in shown]}
    found: dict[str, list[dict[str, float]]] = {"ring": [], "uint8": [], "float32": [], "normalising": []}
    for _ in range(rounds):
        for name, items in arms.items():
            found[name].append(handed_over(items, batches, ring=name == "ring"))
        found["normalising"].append(normalising(spec, raw))
    sums = {name: [sum(each.values()) for each in found[name]] for name in arms}
    medians: dict[str, Any] = {
        name: {key: round(statistics.median(each[key] for each in values), 2) for key in values[0]}
        for name, values in found.items()
    }
    medians["ratio"] = _ratios(sums["uint8"], sums["float32"])
    medians["cheaper"] = {name: _ratios(sums[name], sums["ring"]) for name in ("float32", "uint8")}
    medians["first_batch"] = first_batch()
    medians["mib"] = {name: items[0].nbytes * pictures / 2**20 for name, items in arms.items()}
    return medians


def _ratios(one: list[float], other: list[float]) -> dict[str, float]:
    """Round by round, as the arms took turns."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    found = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {key: round(value, 3) for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="side of a picture in pixels")
    parser.add_argument("--pictures", type=int, default=256, help="of a batch")
    parser.add_argument("--batches", type=int, default=6, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    result = {
        "size": options.size,
        "pictures": options.pictures,
        "batches": options.batches,
        "rounds": options.rounds,
        "unit": "CPU milliseconds of a batch; seconds of first_batch",
        "first": {"workers": FIRST_WORKERS, "pictures": FIRST_ROWS, "seconds_of_each": FIRST_SECONDS},
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

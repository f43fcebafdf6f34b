"""How long a step loop stands still for a checkpoint: `python benchmarks/checkpoints.py --json out.json`.

A student of some size with AdamW's state is saved again and again. Three arms take turns. `before` is what versions
without the thread did: copies in new memory, and BLAKE2b. `waits` returns when the thread has written, `copies` when
the copy is made. The thread is done before the next save begins. Times are medians of the rounds. CPU seconds are those
that the step loop is without: of the whole process where the loop waits, else of the main thread. The wall's are told
too: on a machine that others use they are theirs as well. The first save makes the memory for the copies, and is told
apart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cmapkd.training import checkpoint
from cmapkd.training.checkpoint import Progress, optimizer_tensors
from cmapkd.training.processes import start_processes
from cmapkd.training.state import RunState
from retrieval import processor

WIDTH, LAYERS = 1024, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start_processes(on_cpu=True)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, WIDTH)).square().mean().backward()
    optimizer.step()
    learned = {"method": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    size = sum(value.nbytes for group in learned.values() for value in group.values())
    folder = Path(tempfile.mkdtemp(dir=arguments.json.parent))
    taken: dict[str, list[tuple[float, float]]] = {"before": [], "waits": [], "copies": []}
    try:
        state = RunState(folder, Accelerator(cpu=True), keep=1, seed=0)
        for number in range(arguments.rounds + 1):
            for place, arm in enumerate(sorted(taken, reverse=bool(number % 2))):
                clock = time.thread_time if arm == "copies" else time.process_time
                progress = Progress(step=3 * number + place + 1)
                began = time.perf_counter(), clock()
                if arm == "before":
                    save_as_before(folder, learned, progress)
                else:
                    state.save(learned, progress)
                if arm == "waits":
                    state.finish()
                taken[arm].append((time.perf_counter() - began[0], clock() - began[1]))
                state.finish()
    finally:
        shutil.rmtree(folder)
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "processor": processor(),
        "mib": round(size / 2**20),
        "rounds": arguments.rounds,
    }
    for arm, pairs in taken.items():
        walls, own = zip(*pairs[1:], strict=True)
        found[arm] = {"wall": round(statistics.median(walls), 4), "cpu": round(statistics.median(own), 4)}
    found["copies"]["first"] = round(taken["copies"][0][1], 4)
    ratios = [now / before for (_, now), (_, before) in zip(taken["copies"][1:], taken["before"][1:], strict=True)]
    found["ratio"] = {"median": round(statistics.median(ratios), 3), "highest": round(max(ratios), 3)}
    arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def save_as_before(folder: Path, learned: dict[str, dict[str, Tensor]], progress: Progress) -> None:
    """In new memory, with the checksums of earlier versions, while the loop waits."""
    tensors = learned | {"random-0": checkpoint.random_tensors()}
    cloned = {group: {name: each.clone() for name, each in found.items()} for group, found in tensors.items()}
    with mock.patch.object(checkpoint, "_checksum", partial(checkpoint._checksum, like="0" * 32)):
        checkpoint.write_checkpoint(checkpoint.checkpoint_path(folder, progress.step), cloned, progress)
    checkpoint.remove_old(folder, keep=1)


if __name__ == "__main__":
    main()

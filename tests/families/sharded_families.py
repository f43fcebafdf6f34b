"""What each of two processes does for `test_sharded.py`: trains every family whole, then shared out, with an average.

A script, so that importing torch is paid once.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import get_context

sys.path.insert(0, str(Path(__file__).parent))
from family_support import FAMILIES, all_tensors, make, method_for

from helpers import MemorySource, make_trainer

TWO, STEPS = 2, 3
HOW = ("none", "fsdp2")
FAILED = "failed"


def trained(name: str, folder: Path, sharding: str = "none") -> dict[str, Tensor]:
    """The student that would be saved after a few steps, and the weights that a checkpoint would hold."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    method = method_for(make(name, folder / "model"))
    options: dict[str, Any] = {"schedule": "constant", "eps": 1e-2}  # with a small one AdamW enlarges rounding
    trainer = make_trainer(
        folder / "run", method, source=MemorySource(40), steps=STEPS, optim=options, ema=0.8, sharding=sharding
    )
    student = trainer.run().student
    held = {
        f"held/{group}/{key}": value for group, kept in trainer.learned_state().items() for key, value in kept.items()
    }
    return held if dist.is_initialized() and dist.get_rank() else held | prefixed("student", all_tensors(student))


def prefixed(start: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{start}/{key}": value for key, value in tensors.items()}


def work(rank: int, port: int, out: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": TWO, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    warnings.simplefilter("ignore")
    for name in FAMILIES:
        for how in HOW:
            # every process builds the model from a folder of its own, so none writes what another reads
            folder = out / f"{name}, {how}"
            try:
                found: dict[str, Any] = trained_together(name, folder, how, rank)
            except Exception:
                found = {FAILED: traceback.format_exc()}
            torch.save(found, out / f"{name}, {how}, rank {rank}.pt")
            dist.barrier()


def trained_together(name: str, folder: Path, how: str, rank: int) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in trained(name, folder / str(rank), how).items()}


def main(out: Path) -> None:
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch: once, before the fork
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    processes = [context.Process(target=work, args=(rank, port, out)) for rank in range(TWO)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a process failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

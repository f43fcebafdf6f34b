"""What each of two processes does for `test_sharded.py`: trains every family whole, then shared out, with an average.

A script, so that importing torch is paid once.
"""

from __future__ import annotations

import copy
import os
import socket
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import get_context

sys.path.insert(0, str(Path(__file__).parent))
from family_support import FAMILIES, all_tensors, make, method_for

from cmapkd.models import DualEncoder
from helpers import MemorySource, make_trainer

TWO, STEPS = 2, 3
HOW = ("none", "fsdp2")
FAILED = "failed"
PATIENCE = 120.0  # seconds that two processes may take for one family


def trained(student: DualEncoder, folder: Path, sharding: str = "none") -> dict[str, Tensor]:
    """The student that would be saved after a few steps, and the weights that a checkpoint would hold."""
    options: dict[str, Any] = {"schedule": "constant", "eps": 1e-2}  # with a small one AdamW enlarges rounding
    trainer = make_trainer(
        folder, method_for(student), source=MemorySource(40), steps=STEPS, optim=options, ema=0.8, sharding=sharding
    )
    result = trainer.run()
    groups = {f"held/{group}": kept for group, kept in trainer.learned_state().items()}
    if trainer.accelerator.is_main_process:  # the others have no whole student
        groups["student"] = all_tensors(result.student)
    return {f"{group}/{key}": value.clone() for group, tensors in groups.items() for key, value in tensors.items()}


def work(name: str, student: DualEncoder, rank: int, port: int, out: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": TWO, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()}
    warnings.simplefilter("ignore")
    for how in HOW:
        place_of = out / f"{name}, {how}, rank {rank}.pt"
        try:
            torch.save(trained(copy.deepcopy(student), out / f"{name}, {how}", how), place_of)
        except Exception:
            torch.save({FAILED: traceback.format_exc()}, place_of)
            raise


def main(out: Path) -> None:
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch: once, before the fork
    context = get_context("fork")
    for name in FAMILIES:
        student = make(name, out / name)  # here: transformers writes on the first process of a group only
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [context.Process(target=work, args=(name, student, rank, port, out)) for rank in range(TWO)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
            process.kill()  # one whose partner failed would wait for it


if __name__ == "__main__":
    main(Path(sys.argv[1]))

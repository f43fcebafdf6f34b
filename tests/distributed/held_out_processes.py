"""What one process or each of two does for `test_held_out_processes.py`: a run that is selected by held-out pairs.

A script, because the trainer starts the process group itself.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import get_context

sys.path.insert(0, str(Path(__file__).parents[1]))

from cmapkd.data.held_out import WithHeldOut
from cmapkd.data.parts import PartOfSource
from cmapkd.training import Trainer
from helpers import CMAPKD_EXACT, MemorySource, make_builder, make_method, make_trainer

EXACT = {"preconditioned": False}  # small moments would enlarge rounding errors
WEIGHTINGS: dict[str, dict[str, Any]] = {
    "slopes": {"name": "gradient_alignment", "every": 2, "norms_every": 2, "rate": 0.5, **EXACT},
    "slopes by sample": {"name": "gradient_alignment", "every": 1, "by_sample": 0.5, "agreement": -1.0, **EXACT},
    "bilevel": {"name": "bilevel", "every": 2, "norms_every": 2, "hidden": 4, "rate": 0.1, **EXACT},
    "bandit": {"name": "bandit", "window": 2, "norms_every": 2, "rate": 0.5},
    "policy": {"name": "policy", "warmup_steps": 2, "window": 2, "edge": 1},
}
TWO = 2
LENGTHS = {"bandit": (3, 6), "policy": (3, 6)}  # steps before and after the resume: of those that act after windows


def trainer(name: str, out: Path, steps: int) -> Trainer:
    method = make_method("cmapkd", settings={**CMAPKD_EXACT, "weighting": WEIGHTINGS[name]})
    source = MemorySource(40)
    optim = {"schedule": "constant", "eps": 1e-2}  # with a small one AdamW makes large steps of rounding errors
    made = make_trainer(
        out, method, source=PartOfSource(source, 0, 28), steps=steps, optim=optim, checkpoint_every=steps
    )
    held_out = make_builder(make_method("contrastive", student=method.student), PartOfSource(source, 28, 40))
    every = method.held_out_every
    assert every is not None
    place = made.accelerator
    made.builder = WithHeldOut(
        made.builder,
        held_out,
        every=every,
        batch_size=None if method.held_out_whole else 8,
        seed=5,
        rank=place.process_index,
        world_size=place.num_processes,
    )
    return made


def trained(name: str, out: Path) -> dict[str, Tensor]:
    """Everything that a checkpoint would hold at the end of a few steps, resumed half way."""
    half, steps = LENGTHS.get(name, (2, 4))
    trainer(name, out, half).run()
    again = trainer(name, out, steps)
    again.run(resume=True)
    groups = again.learned_state().items()
    return {f"{name}/{group}/{key}": value.clone() for group, held in groups for key, value in held.items()}


def work(rank: int, port: int, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(TWO),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    found: dict[str, Tensor] = {}
    for name in WEIGHTINGS:
        found |= trained(name, out / name)
    torch.save(found, out / f"rank-{rank}.pt")


def main(out: Path) -> None:
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch: once, before the fork
    gc.freeze()  # each run of the children looks for circles, and need not look here
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

"""What two processes exchange in a step, and what it costs: `python benchmarks/exchange.py --json out.json`.

Two numbers of this machine, both with gloo on one thread a process:

- the bytes that the gradient of gathered rows sends, counted by the system at the loopback interface. Arms: every
  process gets the sum of all rows (`all_reduce` in float32), or of its own alone, as `cmapkd.features.gather` does;
- CPU milliseconds of forward and backward pass of a student. Arms: torch's wrapper that looks for parameters without
  gradient in each step, or `cmapkd.training.exchange`, which looks once a stage. They take turns, step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import get_context

from cmapkd.features.gather import gather_rows
from cmapkd.methods import Method
from cmapkd.training.exchange import AveragedGradients
from retrieval import processor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import make_method, random_batch

ROWS, WIDTH = 4096, 512
METHODS_MEASURED = ("contrastive", "cmapkd")
BATCH, WARM = 16, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__, "processor": processor(), "rows": ROWS, "width": WIDTH}
    found |= {"batch": BATCH, "steps": arguments.steps}
    context = get_context("fork")
    for size in (2, 4):
        answers: Any = context.SimpleQueue()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [
            context.Process(target=work, args=(rank, size, port, arguments.steps, answers)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        found |= answers.get()
        for process in processes:
            process.join()
    arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def work(rank: int, size: int, port: int, steps: int, answers: Any) -> None:
    """One process of a group; the first answers for all."""
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {
        f"bytes_of_{size}": {f"{dtype}"[6:]: sent(dtype) for dtype in (torch.float32, torch.bfloat16)}
    }
    if size == 2:
        found["step"] = {name: stepped(name, steps) for name in METHODS_MEASURED}
    dist.barrier()
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def received() -> int:
    """Bytes that the loopback interface has passed on since the system began."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def sent(dtype: torch.dtype) -> dict[str, float]:
    """Bytes of the gradient of gathered rows, by all processes: of a sum of all rows, of its own, and their ratio."""

    def counted(act: Any) -> int:
        least = None
        for _ in range(3):  # others use the interface too
            dist.barrier()
            before = received()
            act()
            dist.barrier()
            passed = received() - before
            least = passed if least is None else min(least, passed)
        assert least is not None
        return least

    rows = torch.randn(ROWS // dist.get_world_size(), WIDTH).to(dtype).requires_grad_()
    gathered = gather_rows(rows)
    asked = torch.randn(ROWS, WIDTH).to(dtype)

    def whole() -> None:
        dist.all_reduce(asked.float())

    def own() -> None:
        torch.autograd.grad(gathered, rows, asked, retain_graph=True)

    before, now = counted(whole), counted(own)
    return {"all_rows": before, "own_rows": now, "ratio": round(now / before, 3)}


def stepped(name: str, steps: int) -> dict[str, float]:
    """Median CPU milliseconds of a step of the first process, and the median of the ratios of neighbours."""
    batch = random_batch(BATCH)
    searching, once = make_method(name).train(), make_method(name).train()
    arms: dict[str, tuple[Method, Any]] = {
        "each_step": (searching, nn.parallel.DistributedDataParallel(searching, find_unused_parameters=True)),
        "once": (once, AveragedGradients(once, torch.device("cpu"))),
    }
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(steps + WARM):
        for arm in sorted(arms, reverse=bool(number % 2)):
            method, wrapped = arms[arm]
            began = time.process_time()
            loss(wrapped(batch)).backward()
            if isinstance(wrapped, AveragedGradients):
                wrapped.after_backward()
            taken[arm].append(time.process_time() - began)
            method.zero_grad(set_to_none=True)
    arms["once"][1].close()
    ratios = [now / before for now, before in zip(taken["once"], taken["each_step"], strict=True)][WARM:]
    medians = {arm: round(1000 * statistics.median(each[WARM:]), 2) for arm, each in taken.items()}
    return medians | {"ratio": round(statistics.median(ratios), 3)}


def loss(terms: Any) -> Tensor:
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


if __name__ == "__main__":
    main()

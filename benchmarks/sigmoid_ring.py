"""SigLIP's loss in several processes: whole on each, own rows of gathered embeddings, and a ring of blocks.

    uv run python benchmarks/sigmoid_ring.py --json docs/results/sigmoid_ring.json

Processes of one thread share a machine over gloo. Each holds its share of random unit embeddings of a batch. Measured
is a forward and backward pass: CPU time of the process, the median over rounds of the slowest process, and the memory
that the pass adds to a process at its peak. The arms take turns. gloo's sending is in the CPU time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cmapkd.features import gather_rows
from cmapkd.methods.sigmoid_ring import ring_sigmoid_loss
from cmapkd.models import Features, TowerFeatures
from cmapkd.objectives import sigmoid_loss
from cmapkd.objectives.chunks import split_rows
from cmapkd.training.peak_memory import forget_peak, peak_bytes

ARMS = ("whole on each", "own rows", "ring")


def loss(arm: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    if arm == "ring":
        return ring_sigmoid_loss(Features(TowerFeatures(image), TowerFeatures(text), scale, bias))
    rows = gather_rows(image), gather_rows(text)
    if arm == "whole on each":
        return sigmoid_loss(*rows, logit_scale=scale, logit_bias=bias)
    with split_rows(dist.get_rank(), dist.get_world_size(), gather_rows):
        return sigmoid_loss(*rows, logit_scale=scale, logit_bias=bias)


def work(rank: int, processes: int, port: int, batch: int, width: int, rounds: int, send: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    draws, share = torch.Generator().manual_seed(rank), batch // processes
    image, text = (torch.randn(share, width, generator=draws).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    peaks: dict[str, list[int]] = {arm: [] for arm in ARMS}
    values: dict[str, float] = {}
    for number in range(1 + rounds):
        for arm in ARMS:
            dist.barrier()
            forget_peak(torch.device("cpu"))
            before, start = peak_bytes(torch.device("cpu")), time.process_time()
            value = loss(arm, image, text, scale, bias)
            value.backward()
            if number:
                seconds[arm].append(time.process_time() - start)
                peaks[arm].append(peak_bytes(torch.device("cpu")) - before)
            values[arm] = float(value.detach())
    send.send((seconds, peaks, values))
    dist.barrier()
    dist.destroy_process_group()


def measure(processes: int, batch: int, width: int, rounds: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    started = [
        context.Process(target=work, args=(rank, processes, port, batch, width, rounds, pipes[rank][1]))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    found = [pipe[0].recv() for pipe in pipes]
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise SystemExit(f"a process of {processes} failed")
    slowest = {
        arm: statistics.median(max(column) for column in zip(*(each[0][arm] for each in found), strict=True))
        for arm in ARMS
    }
    return {
        "seconds": {arm: round(value, 3) for arm, value in slowest.items()},
        "over_whole": {arm: round(value / slowest[ARMS[0]], 3) for arm, value in slowest.items()},
        "peak_mib": {arm: round(max(statistics.median(each[1][arm]) for each in found) / 2**20, 1) for arm in ARMS},
        "largest_difference_of_values": max(
            abs(each[2][arm] - found[0][2][ARMS[0]]) / abs(found[0][2][ARMS[0]]) for each in found for arm in ARMS
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    from cmapkd.provenance import describe_environment

    settings = {"batch": arguments.batch, "width": arguments.width, "rounds": arguments.rounds}
    result = {**settings, "processes": {str(n): measure(n, **settings) for n in (2, 4)}}
    result["environment"] = describe_environment()
    text = json.dumps(result, indent=2)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

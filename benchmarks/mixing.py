"""How well windows of shards mix beside a full shuffle, and what their order costs: `python benchmarks/mixing.py`.

Batches are planned, not read. Of each batch it is counted how many of its pairs come from one shard. The mean of each
batch is taken of a number that samples of one shard have in part in common (intra-shard correlation r): its variance,
beside that of independent samples, says how much a batch tells less than a full shuffle's. A last part plans the order
of a billion samples and takes its time and memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmapkd.data.random import permuted
from cmapkd.data.window_order import WindowOrder
from cmapkd.provenance import describe_environment

SHARDS, IN_SHARD, BATCH = 1024, 512, 1024
ARMS = {"full": None, "64 x 16": (64, 16), "32 x 8": (32, 8), "16 x 8": (16, 8), "8 x 8": (8, 8), "4 x 4": (4, 4)}
CORRELATIONS = (0.01, 0.1)
LARGE_SHARDS, LARGE_BATCH = 140_000, 32_768  # about 1.1 billion samples

Plan = Callable[[int, int], NDArray[np.int64]]  # of an epoch and a step: the samples


def order_of(lanes: int, window: int, seed: int) -> WindowOrder:
    counts = np.full(SHARDS, IN_SHARD)
    return WindowOrder(counts, lanes=lanes, rows=BATCH // lanes, window=window, seed=seed)


def plan_of(arm: tuple[int, int] | None, seed: int) -> Plan:
    if arm is None:
        length = SHARDS * IN_SHARD
        return lambda epoch, step: permuted(np.arange(step * BATCH, (step + 1) * BATCH), length, "order", seed, epoch)
    order = order_of(*arm, seed)
    return lambda epoch, step: order.samples(epoch, step * BATCH, (step + 1) * BATCH)


def mixing(arm: tuple[int, int] | None, epochs: int, every: int) -> dict[str, Any]:
    """Means over every `every`-th batch of so many epochs, each of another seed."""
    draws = np.random.default_rng(0)
    of_shard, own = draws.standard_normal(SHARDS), draws.standard_normal(SHARDS * IN_SHARD)
    of_shard, own = (each / each.std() - each.mean() / each.std() for each in (of_shard, own))
    pairs, distinct, means = [], [], {r: [] for r in CORRELATIONS}
    for epoch in range(epochs):
        plan = plan_of(arm, seed=epoch)
        for step in range(epoch % every, SHARDS * IN_SHARD // BATCH, every):
            samples = plan(epoch, step)
            counts = np.bincount(samples // IN_SHARD, minlength=SHARDS)
            pairs.append((counts * (counts - 1)).sum() / (BATCH * (BATCH - 1)))
            distinct.append(int((counts > 0).sum()))
            for r in CORRELATIONS:
                value = np.sqrt(r) * of_shard[samples // IN_SHARD] + np.sqrt(1 - r) * own[samples]
                means[r].append(value.mean())
    return {
        "batches": len(pairs),
        "pairs_of_one_shard": float(np.mean(pairs)),
        "shards_in_a_batch": float(np.mean(distinct)),
        "variance_of_means": {str(r): float(np.mean(np.square(means[r])) * BATCH) for r in CORRELATIONS},
    }


def reading(lanes: int, window: int) -> dict[str, Any]:
    """How many shards an epoch reads at a time, and how often each is begun."""
    order = order_of(lanes, window, seed=0)
    open_at = [len(order.shards(0, step * BATCH, (step + 1) * BATCH)) for step in range(0, order.length // BATCH, 4)]
    begun = sum(len(order.shards(0, 0, order.length // BATCH * BATCH, slice(lane, lane + 1))) for lane in range(lanes))
    return {"mean_open": float(np.mean(open_at)), "most_open": max(open_at), "begun_per_shard": begun / SHARDS}


def large(rounds: int) -> dict[str, Any]:
    """Time and memory of an order of a billion samples, and of the plan of a batch in it."""
    counts = np.random.default_rng(0).integers(6000, 10000, LARGE_SHARDS)
    options: dict[str, Any] = {"lanes": 64, "rows": LARGE_BATCH // 64, "window": 16, "seed": 0}

    def begun() -> WindowOrder:
        order = WindowOrder(counts, **options)
        order.samples(0, 0, LARGE_BATCH)
        return order

    tracemalloc.start()
    begun()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    first, windows, full = [], [], []
    for number in range(rounds):  # the arms take turns
        start = time.process_time()
        order = begun()
        first.append(time.process_time() - start)
        places = (1 + number) * LARGE_BATCH
        start = time.process_time()
        order.samples(0, places, places + LARGE_BATCH)
        windows.append(time.process_time() - start)
        start = time.process_time()
        permuted(np.arange(places, places + LARGE_BATCH), order.length, "order", 0, 0)
        full.append(time.process_time() - start)
    step = statistics.median(windows)
    return {
        "samples": int(counts.sum()),
        "shards": LARGE_SHARDS,
        "batch": LARGE_BATCH,
        "seconds_to_begin": statistics.median(first),
        "peak_bytes": peak,
        "milliseconds_of_a_step": 1e3 * step,
        "milliseconds_of_a_lane": 1e3 * step / options["lanes"],
        "milliseconds_of_a_full_shuffle": 1e3 * statistics.median(full),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--every", type=int, default=4, help="take every so manieth batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "settings": {"shards": SHARDS, "samples_in_a_shard": IN_SHARD, "batch": BATCH, "epochs": arguments.epochs},
        "mixing": {name: mixing(arm, arguments.epochs, arguments.every) for name, arm in ARMS.items()},
    }
    full = found["mixing"]["full"]["pairs_of_one_shard"]
    for name, arm in ARMS.items():
        row = found["mixing"][name]
        row["pairs_of_other_shards_to_full"] = (1 - row["pairs_of_one_shard"]) / (1 - full)
        row["pairs_of_one_shard_to_full"] = row["pairs_of_one_shard"] / full
        row |= reading(*arm) if arm is not None else {}
    found["large"] = large(arguments.rounds)
    found["environment"] = describe_environment()
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

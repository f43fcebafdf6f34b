"""A bank of reference embeddings: cost of a step by its size and by how many of its pairs are drawn, and its memory.

    uv run python benchmarks/bank.py --threads 1 --json docs/results/bank.json

A step is what CMAPKD does with a bank for both modalities: choosing references, the divergence, its gradient. Each size
is measured in a process of its own; memory is the peak of that process above what it held before the bank was made. It
is measured in one more process, in which glibc is told to give freed memory back (`with_holes`: without that, holes of
its heap included, more or fewer in every run). Reading the entries out of a cache is in `fill_ms`. On one CPU thread
the clock is the thread's own time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmapkd.cache import CacheReader, all_keys
from cmapkd.cache.files import write_json
from cmapkd.cache.folder import CacheFolder
from cmapkd.cache.layout import Field, RowLayout
from cmapkd.cache.rows import CHECK
from cmapkd.features import EmbeddingBank
from cmapkd.objectives import bank_divergence
from cmapkd.provenance import describe_environment

PEAKS = ("peak_of_fill_mib", "peak_of_steps_mib")
M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 8192, 32768, 100_000])
    parser.add_argument("--samples", type=int, nargs="+", default=[0, 1024, 2048, 4096], help="drawn at a step; 0: all")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--store", choices=("fp16", "fp32"), default="fp16", help="of the bank's numbers")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    for size in arguments.sizes:
        for sample in arguments.samples:
            if sample < size:
                rows.append(in_fork(size, sample, arguments))
                tight = in_fork(size, sample, arguments, tight=True)
                rows[-1] |= {f"{name}_with_holes": rows[-1][name] for name in PEAKS} | {
                    name: tight[name] for name in PEAKS
                }
                print(rows[-1], flush=True)
    settings = {key: getattr(arguments, key) for key in ("batch", "width", "steps", "store")}
    result = {"settings": settings, "rows": rows, "environment": describe_environment()}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def in_fork(size: int, sample: int, arguments: argparse.Namespace, *, tight: bool = False) -> dict[str, Any]:
    """`measure` in a process that has only imported; torch must have run nothing in this one."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            try:
                if tight:
                    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)
                Path(file.name).write_text(json.dumps(measure(size, sample, arguments)))
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"size {size}, sample {sample}: ended with status {status}")
        result: dict[str, Any] = json.loads(Path(file.name).read_text())
        return result


def measure(size: int, sample: int, arguments: argparse.Namespace) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(0)
    batch, width = arguments.batch, arguments.width
    anchors = [torch.randn(batch, width, generator=draws).requires_grad_() for _ in range(2)]
    targets = [torch.randn(batch, width, generator=draws) for _ in range(2)]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        cache = stored(Path(folder), size, width)
        before = peak()
        start = clock()
        bank = EmbeddingBank(size, width, store=arguments.store, fixed=True)
        bank.fill(CacheReader(cache, check="sizes").embeddings(size, all_keys(cache.length, 1), seed=0))
        fill = clock() - start
    held = peak()
    seconds = []
    for _ in range(1 + arguments.steps):
        start = clock()
        found = bank.references(torch.arange(batch), num=sample or None, generator=draws)
        losses = [
            bank_divergence(
                ours, theirs, entries, student_scale=20.0, teacher_scale=20.0, exclude=found.exclude, frozen=True
            ).mean()
            for ours, theirs, entries in zip(anchors, targets, (found.text, found.image), strict=True)
        ]
        torch.stack(losses).mean().backward()
        seconds.append(clock() - start)
        del found, losses  # as they end with a step of a run
    return {
        "entries": size,
        "drawn": sample or size,
        "step_ms": round(1000 * statistics.median(seconds[1:]), 2),
        "fill_ms": round(1000 * fill, 1),
        "entries_mib": round(sum(own.nbytes for own in bank.buffers()) / 2**20, 1),
        "peak_of_fill_mib": round((held - before) / 2**20, 1),
        "peak_of_steps_mib": round((peak() - before) / 2**20, 1),
    }


def stored(folder: Path, size: int, width: int) -> CacheFolder:
    """A cache of `global` rows of noise, without a teacher."""
    layout = RowLayout("global", "fp16", (Field("image", None, (width,)), Field("text", None, (width,))))
    cache = CacheFolder.create(
        folder / "c", identity={}, layout=layout, about={}, logit_scale=20.0, logit_bias=None, length=size
    )
    cache.add_part(np.arange(size, dtype=np.int64), number=0, batch_size=128, shard_bytes=16 * 2**20)
    part = cache.parts()[0]
    noise = np.random.default_rng(0)
    for shard in range(part.num_shards):
        first, last = part.extent(shard)
        rows = np.zeros(last - first, layout.dtype)
        rows[CHECK] = 1
        for name in ("image", "text"):
            rows[name] = noise.standard_normal((last - first, width), dtype=np.float32)
        rows.tofile(part.data(shard))
        write_json(
            part.record(shard), {"rows": last - first, "bad": 0, "checksum": part.checksum(shard), "fidelity": {}}
        )
    return cache


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()

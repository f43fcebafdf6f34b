"""Opening a cache of many rows: CPU time and memory, rows by data shards beside rows for the data as a whole.

    uv run python benchmarks/cache_opening.py --json docs/results/cache_opening.json

Files of rows are as long as they would be and hold nothing, because opening reads none of them. Each opening is made in
a process of its own: the plan of one epoch, the folder, the look at every file, and whether all rows are there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from cmapkd.cache import CacheFolder, CacheReader, all_keys
from cmapkd.cache.files import write_json
from cmapkd.cache.folder import ShardsOfRun
from cmapkd.cache.identity import BY_SHARD
from cmapkd.cache.layout import Field, RowLayout
from cmapkd.cache.shard_part import ShardPart
from cmapkd.data.shard_contents import ShardContents
from cmapkd.provenance import describe_environment

WIDTH = 768  # of ViT-L/14
ARMS = ("by data shards", "as a whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--samples", type=int, default=10_000, help="of each shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shards, samples = arguments.shards, arguments.samples
    with tempfile.TemporaryDirectory() as name:
        for arm in ARMS:
            make(Path(name) / arm, arm, shards, samples)
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for _ in range(arguments.rounds):
            for arm in ARMS:
                found[arm].append(in_a_process(Path(name) / arm, arm, shards, samples))
    arms = {arm: {key: statistics.median(each[key] for each in found[arm]) for key in found[arm][0]} for arm in ARMS}
    result = {
        "rows": shards * samples,
        "shards": shards,
        "rounds": arguments.rounds,
        "arms": arms,
        "environment": describe_environment(),
    }
    print(json.dumps(result, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def contents_of(shards: int, samples: int) -> ShardContents:
    digests = np.random.default_rng(0).bytes(16 * shards)
    return ShardContents(np.frombuffer(digests, "V16"), np.full(shards, samples))


def make(folder: Path, arm: str, shards: int, samples: int) -> None:
    """A complete cache of one view in fp16, whose rows are holes in files."""
    layout = RowLayout("global", "fp16", (Field("image", None, (WIDTH,)), Field("text", None, (WIDTH,))))
    length = shards * samples
    cache = CacheFolder.create(
        folder,
        identity={"data": BY_SHARD} if arm == ARMS[0] else {},
        layout=layout,
        about={},
        logit_scale=1.0,
        logit_bias=None,
        length=length,
    )
    options: dict[str, Any] = {"batch_size": 128, "shard_bytes": 64 * 2**20}
    if arm == ARMS[0]:
        cache = cache.of(ShardsOfRun(contents_of(shards, samples), 1, "", 128))
        cache.begin_rows(**options)
    else:
        cache.add_part(np.arange(length, dtype=np.int64), number=0, **options)
    part = cache.parts()[0]
    for shard in range(part.num_shards):
        first, last = part.extent(shard)
        with part.data(shard).open("wb") as file:
            file.truncate((last - first) * part.row_bytes)
        write_json(part.record(shard), {"rows": last - first, "bad": 0, "checksum": "", "fidelity": {}})


def in_a_process(folder: Path, arm: str, shards: int, samples: int) -> dict[str, float]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=open_it, args=(folder, arm, shards, samples, sender))
    process.start()
    found: dict[str, float] = receiver.recv()
    process.join()
    return found


def open_it(folder: Path, arm: str, shards: int, samples: int, sender: Any) -> None:
    contents = contents_of(shards, samples)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    wanted = all_keys(shards * samples, 1)
    cache = CacheFolder.open(folder)
    reader = CacheReader(cache.of(ShardsOfRun(contents, 1, "", 128)) if arm == ARMS[0] else cache)
    opened = time.process_time()
    assert reader.num_absent(wanted) == 0
    seconds = time.process_time() - began
    assert isinstance(reader.parts[0], ShardPart) == (arm == ARMS[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sender.send(
        {"seconds": round(seconds, 4), "open_seconds": round(opened - began, 4), "peak_mib": round(peak / 1024, 1)}
    )


if __name__ == "__main__":
    main()

"""Remote tars on a loopback server with injected latency: `python benchmarks/remote.py --json out.json`.

Two measurements. **Rates**: samples (pictures and texts, not decoded) are read from whole shards that are fetched into
copies, by one request a sample, and by 16 such requests side by side; the arms take turns. **Epochs**: whole epochs are
read in windows of shards while the room for copies is small, and what the server sent is compared with the size of all
shards.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cmapkd.data.fetch_ahead import FetchAhead
from cmapkd.data.open import open_source
from cmapkd.data.ordering import Ordering
from cmapkd.data.plans import PlanSampler
from cmapkd.data.shards import ShardSource
from cmapkd.provenance import describe_environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))
from serving import serving

Rate = dict[str, float]
WHOLE, ONE, SIDE_BY_SIDE = "whole shards", "one request at a time", "16 requests side by side"
REQUESTS = {ONE: 1, SIDE_BY_SIDE: 16}


def write_shards(folder: Path, shards: int, samples: int, size: int) -> None:
    """Tars of random bytes that look like pictures and captions."""
    draws = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number in range(samples):
                for name, data in ((".jpg", draws.bytes(size)), (".txt", b"a caption of some words")):
                    info = tarfile.TarInfo(f"{number:04}{name}")
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))


def opened(url: str, shards: int, room: int) -> ShardSource:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = open_source(f"webdataset:{url}/{{00000..{shards - 1:05}}}.tar?disk={room / 2**30!r}")
    assert isinstance(source, ShardSource)
    return source


def empty(source: ShardSource) -> None:
    for file in source.files.folder.glob("*.tar"):  # type: ignore[union-attr]
        file.unlink()


def bytes_of(source: ShardSource, index: int) -> int:
    """Reads a picture and its text, without decoding."""
    entry, _ = source._find(index)
    return sum(len(source._read(entry, place)) for place in source._members(entry).values())


def rate(count: int, start: tuple[float, float]) -> Rate:
    """Samples a second, and CPU time of this process for each."""
    seconds, cpu = time.monotonic() - start[0], time.process_time() - start[1]
    return {"per_second": count / seconds, "cpu_microseconds": 1e6 * cpu / count}


def whole_shards(source: ShardSource) -> Rate:
    """Over all samples, from an empty folder; a thread fetches ahead of the reader."""
    empty(source)
    urls = source._set.paths
    start = time.monotonic(), time.process_time()
    ahead = threading.Thread(target=lambda: [None for _ in urls if source.files.hold(urls)])  # type: ignore[union-attr]
    ahead.start()
    for index in range(len(source)):
        bytes_of(source, index)
    ahead.join()
    return rate(len(source), start)


def by_ranges(source: ShardSource, count: int, side_by_side: int) -> Rate:
    """One request a sample: its members are beside each other."""
    system = source.files.store._system()  # type: ignore[union-attr]

    def read(index: int) -> int:
        shard, sample = source._entry(index)
        places = list(source._members((shard, sample)).values())
        first, last = min(at for at, _ in places), max(at + size for at, size in places)
        return len(system.cat_file(source._set.paths[shard], start=first, end=last))

    indices = np.random.default_rng(0).integers(0, len(source), count).tolist()
    start = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(read, indices))
    return rate(count, start)


def serve(folder: Path, latency: float, pipe: Connection) -> None:
    """In a process of its own, so that reading and serving do not wait for each other's Python."""
    with serving(folder) as store:
        store.latency = latency
        pipe.send(store.url)
        pipe.recv()


def rates(latency: float, rounds: int) -> dict[str, Any]:
    shards, samples = 8, 1000
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), shards, samples, 2000)
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("fork").Process(target=serve, args=(Path(folder), latency, there))
        server.start()
        source = opened(here.recv(), shards, 2**30)
        found: dict[str, list[Rate]] = {WHOLE: [], **{arm: [] for arm in REQUESTS}}
        for _ in range(rounds):
            found[WHOLE].append(whole_shards(source))
            for arm, requests in REQUESTS.items():
                found[arm].append(by_ranges(source, 100 * requests, requests))
        here.send("the end")
        server.join()
    return {
        "latency_seconds": latency,
        "arms": {
            arm: {key: statistics.median(each[key] for each in values) for key in values[0]}
            for arm, values in found.items()
        },
        **{f"ratio_of_rates, {arm}": ratio(found, arm, "per_second") for arm in REQUESTS},
        **{f"ratio_of_cpu, {arm}": 1 / ratio(found, arm, "cpu_microseconds") for arm in REQUESTS},
    }


def ratio(found: dict[str, list[Rate]], arm: str, key: str) -> float:
    """Of whole shards to an arm, the median over rounds."""
    return statistics.median(whole[key] / other[key] for whole, other in zip(found[WHOLE], found[arm], strict=True))


def epochs(count: int) -> dict[str, Any]:
    shards, samples, batch, lanes, window = 512, 16, 64, 8, 4
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as store:
        write_shards(Path(folder), shards, samples, 300)
        sizes = [file.stat().st_size for file in Path(folder).iterdir()]
        room = 2 * lanes * (window + 1) * max(sizes)
        source = opened(store.url, shards, room)
        empty(source)
        streams = Ordering("window", lanes, window).streams(source, length=len(source), batch_size=batch, seed=0)
        steps = len(source) // batch
        plans = PlanSampler(len(source), batch_size=batch, seed=0, start=0, stop=count * steps, streams=streams)
        sent, most = [], 0
        with FetchAhead(source, plans) as ahead:
            for plan in plans:
                if plan.step % steps == 0:
                    sent.append(store.bodies.total())
                for index in plan.everyone:
                    bytes_of(source, index)
                ahead.advance(plan.step)
                most = max(most, taken(source))
        sent.append(store.bodies.total())
    each = [(after - before) / sum(sizes) for before, after in pairwise(sent)]
    return {
        "shards": shards,
        "lanes": lanes,
        "window": window,
        "room_to_all_shards": room / sum(sizes),
        "most_taken_to_room": most / room,
        "sent_to_all_shards": statistics.mean(each),
        "of_each_epoch": each,
    }


def taken(source: ShardSource) -> int:
    """Bytes of copies, and of what is being fetched."""
    found: dict[int, int] = {}  # a file that is renamed meanwhile counts once
    for file in source.files.folder.iterdir():  # type: ignore[union-attr]
        with suppress(FileNotFoundError):
            if file.suffix in (".tar", ".part"):
                status = file.stat()
                found[status.st_ino] = status.st_size
    return sum(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        found: dict[str, Any] = {"epochs": epochs(arguments.epochs)}
        print(found, file=sys.stderr)
        found["rates"] = rates(arguments.latency, arguments.rounds)
    found["environment"] = describe_environment()
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

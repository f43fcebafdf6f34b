"""What it costs to open tar shards: CPU time with and without an index in the cache, and memory that stays.

The arm `lists` opens them as this project did before its indexes became files: tarfile reads every header, each sample
becomes an object, and the index is JSON. Tars are made as img2dataset makes them, of tiny pictures: opening reads none.
Arms take turns in one process, each with a cache of its own, and times are CPU time of the process. Memory is what is
private to a process that opens the shards from their indexes, read under many names so that samples outweigh the rest.

    uv run python benchmarks/opening.py --json docs/results/opening.json
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmapkd.data.listed import ListedSource
from cmapkd.data.open import open_source
from cmapkd.data.records import Record, Unusable
from cmapkd.data.shards import ShardSource
from cmapkd.data.stored import SampleFilter
from cmapkd.data.tar_index import Entry, build_index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--names", type=int, default=20, help="under how many names each shard is opened for memory")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # arm and folder: a child's
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(private_bytes(*arguments.memory)))
        return
    with tempfile.TemporaryDirectory(prefix="cmapkd-opening-") as name:
        result = measure(arguments, Path(name))
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from cmapkd.provenance import describe_environment

    (folder / "tars").mkdir()
    each = arguments.samples // arguments.shards
    for shard in range(arguments.shards):
        make_tar(folder / "tars" / f"{shard:05}.tar", shard, each)
    seconds: dict[str, dict[str, list[float]]] = {arm: {"cold": [], "warm": []} for arm in ARMS}
    for number in range(arguments.rounds):
        for arm, opened in ARMS.items():
            with cache(folder / f"cache {arm} {number}"):
                for state in ("cold", "warm"):
                    gc.collect()
                    start = time.process_time()
                    source = opened(f"{folder}/tars")
                    seconds[arm][state].append(time.process_time() - start)
                    assert len(source) == each * arguments.shards
                    del source
    many = folder / "many"
    many.mkdir()
    for shard in sorted((folder / "tars").iterdir()):
        for number in range(arguments.names):
            os.link(shard, many / f"{number:03}{shard.name}")
    kept = {}
    with cache(folder / "cache of many"):
        ShardSource(str(many))
        kept["files"] = child("files", many)
        kept["lists"] = child("lists", folder / "tars")
    median = {
        arm: {state: statistics.median(values) for state, values in found.items()} for arm, found in seconds.items()
    }
    count = each * arguments.shards
    return {
        "settings": {"samples": count, "shards": arguments.shards, "rounds": arguments.rounds},
        "microseconds_per_sample": {
            arm: {state: 1e6 * value / count for state, value in found.items()} for arm, found in median.items()
        },
        "cold_ratio": median["lists"]["cold"] / median["files"]["cold"],
        "warm_ratio": median["lists"]["warm"] / median["files"]["warm"],
        "warm_seconds_of_files": median["files"]["warm"],
        "private_bytes_per_sample": {
            "files": kept["files"] / (count * arguments.names),
            "lists": kept["lists"] / count,
        },
        "samples_of_memory": {"files": count * arguments.names, "lists": count},
        "environment": describe_environment(),
    }


@contextmanager
def cache(folder: Path) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def make_tar(path: Path, shard: int, count: int) -> None:
    """As webdataset's writer does it: pax headers with times in fractions of a second."""
    picture = tiny_picture()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(count):
            key = f"{shard:05}{number:04}"
            caption = f"a photograph of thing number {number} in a street at noon"
            exif = json.dumps({"Image Orientation": "1", "Image Software": "Editor 5.1", "EXIF ColorSpace": "sRGB"})
            record = {"caption": caption, "url": f"https://example.com/pictures/{key}.jpg", "key": key,
                      "status": "success", "error_message": None, "width": 256, "height": 192, "original_width": 1024,
                      "original_height": 768, "exif": exif, "sha256": "0123456789abcdef" * 4}  # fmt: skip
            parts = {"jpg": picture, "json": json.dumps(record, indent=4).encode(), "txt": caption.encode()}
            for field, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size, member.mtime = len(data), 1_700_000_000.25 + number  # type: ignore[assignment]
                archive.addfile(member, io.BytesIO(data))


def tiny_picture() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


class ListSource(ListedSource):
    """Shards as they were opened before: a list of entries of each, columns of int64, and every id kept."""

    def __init__(self, folder: str) -> None:
        columns = [array("q") for _ in range(5)]
        ids: list[str] = []
        captioned: list[bool] = []
        names: dict[str, int] = {}
        bad: dict[int, str] = {}
        for number, path in enumerate(sorted(Path(folder).glob("*.tar"))):
            for entry in entries_of(path):
                if entry.bad:
                    bad[len(ids)] = entry.bad
                ids.append(entry.id or f"{path.stem}/{entry.key}")
                captioned.append(entry.captioned is not False)
                columns[0].append(number)
                for name, (offset, size) in entry.members.items():
                    columns[1].append(names.setdefault(name, len(names)))
                    columns[2].append(offset)
                    columns[3].append(size)
                columns[4].append(len(columns[1]))
        self._columns = [torch.tensor(column, dtype=torch.int64) for column in columns]
        super().__init__(folder, ids, keep=SampleFilter(), captioned=np.array(captioned, dtype=np.bool_), bad=bad)

    def _contents(self) -> Iterator[str]:
        yield ""

    def _record(self, entry: int) -> Record:
        raise Unusable(f"only opened: {entry}")

    def _image(self, entry: int) -> bytes:
        raise Unusable(f"only opened: {entry}")


def entries_of(path: Path) -> list[Entry]:
    status = path.stat()
    stored = Path(os.environ["XDG_CACHE_HOME"]) / f"{path.name}.json"
    if stored.exists():
        rows = json.loads(stored.read_text())
        places = ({str(name): (int(at), int(size)) for name, (at, size) in row[4].items()} for row in rows)
        return [Entry(row[0], place, row[1], row[2], row[3]) for row, place in zip(rows, places, strict=True)]
    entries = build_index(path, (status.st_size, status.st_mtime_ns)).entries
    stored.parent.mkdir(exist_ok=True)
    rows = [[entry.key, entry.id, entry.captioned, entry.bad, entry.members] for entry in entries]
    stored.write_text(json.dumps(rows, separators=(",", ":")))
    return entries


ARMS = {"lists": ListSource, "files": ShardSource}


def child(arm: str, folder: Path) -> int:
    command = [sys.executable, __file__, "--memory", arm, str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def private_bytes(arm: str, folder: str) -> int:
    """Memory that stays when shards are open and a few samples were read; not pages of files, which processes share."""
    ARMS[arm](f"{folder}")  # what is imported or made once
    gc.collect()
    before = private()
    source = ARMS[arm](f"{folder}")
    if isinstance(source, ShardSource):
        for index in range(0, len(source), max(1, len(source) // 100)):
            source.captions(index)
        assert len(source) == len(open_source(f"webdataset:{folder}"))
    gc.collect()
    return private() - before


def private() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


if __name__ == "__main__":
    main()

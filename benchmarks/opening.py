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
import hashlib
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmapkd.data.listed import ListedSource
from cmapkd.data.records import Record, Unusable
from cmapkd.data.shards import ShardSource
from cmapkd.data.stored import SampleFilter, Texts
from cmapkd.data.tar_index import Entry, TarIndex, build_index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--names", type=int, default=20, help="under how many names each shard is opened for memory")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # a folder: a child's
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(private_bytes(arguments.memory)))
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
    seconds: dict[str, dict[str, list[float]]] = {arm: {"cold": [], "warm": [], "fingerprint": []} for arm in ARMS}
    for number in range(arguments.rounds):
        for arm, opened in ARMS.items():
            with cache(folder / f"cache {arm} {number}"):
                for state in ("cold", "warm"):
                    gc.collect()
                    start = time.process_time()
                    source = opened(f"{folder}/tars")
                    seconds[arm][state].append(time.process_time() - start)
                    assert len(source) == each * arguments.shards
                start = time.process_time()
                source.fingerprint()
                seconds[arm]["fingerprint"].append(time.process_time() - start)
                del source
    many = folder / "many"
    many.mkdir()
    for shard in sorted((folder / "tars").iterdir()):
        for number in range(arguments.names):
            os.link(shard, many / f"{number:03}{shard.name}")
    with cache(folder / "cache of many"):
        ShardSource(str(many))
        kept = child(many)
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
        "private_bytes_per_sample": {"files": kept / (count * arguments.names)},
        "samples_of_memory": {"files": count * arguments.names},
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
        shards, fields, offsets, sizes, ends = array("q"), array("q"), array("q"), array("q"), array("q", [0])
        ids: list[str] = []
        captioned: list[bool] = []
        names: dict[str, int] = {}
        bad: dict[int, str] = {}
        self._digests: list[str] = []
        for number, path in enumerate(sorted(Path(folder).glob("*.tar"))):
            index = index_tar(path)
            digest = hashlib.blake2b(f"{path.stem}\0{index.stamp[0]}".encode(), digest_size=16)
            for entry in index.entries:
                if entry.bad:
                    bad[len(ids)] = entry.bad
                ids.append(entry.id or f"{path.stem}/{entry.key}")
                captioned.append(entry.captioned is not False)
                shards.append(number)
                for name, (offset, size) in entry.members.items():
                    fields.append(names.setdefault(name, len(names)))
                    offsets.append(offset)
                    sizes.append(size)
                ends.append(len(fields))
                digest.update(f"{entry.key}\0{entry.members}".encode("utf-8", "surrogatepass"))
            self._digests.append(digest.hexdigest())
        self._columns = [torch.tensor(column, dtype=torch.int64) for column in (shards, fields, offsets, sizes, ends)]
        super().__init__(
            folder, Texts(ids), keep=SampleFilter(), captioned=np.array(captioned, dtype=np.bool_), bad=bad
        )

    def _contents(self) -> Iterable[str]:
        return self._digests

    def _record(self, entry: int) -> Record:
        raise Unusable(f"only opened: {entry}")

    def _image(self, entry: int) -> bytes:
        raise Unusable(f"only opened: {entry}")


def index_tar(path: Path) -> TarIndex:
    """The index of a tar, from its JSON if the tar has not changed since."""
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    name = hashlib.blake2b(f"2\0{path.absolute()}\0{stamp}".encode(), digest_size=16)
    cached = Path(os.environ["XDG_CACHE_HOME"]) / "cmapkd" / "index" / f"{name.hexdigest()}.json"
    index = load(cached, stamp)
    if index is None:
        index = build_index(path, stamp)
        save(cached, index)
    return index


def save(path: Path, index: TarIndex) -> None:
    values = {
        "version": 2,
        "stamp": index.stamp,
        "warnings": index.warnings,
        "entries": [[e.key, e.id, e.captioned, e.bad, e.members] for e in index.entries],
    }
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("w", encoding="ascii") as file:
        json.dump(values, file, separators=(",", ":"))


def load(path: Path, stamp: tuple[int, int]) -> TarIndex | None:
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="ascii"))
    entries = []
    for key, identity, captioned, bad, members in values["entries"]:
        places = {str(name): (int(offset), int(size)) for name, (offset, size) in members.items()}
        whole = all(min(offset, size) >= 0 and offset + size <= stamp[0] for offset, size in places.values())
        types = isinstance(key, str) and isinstance(identity, str | None) and isinstance(bad, str | None)
        if not (whole or bad) or not types or captioned not in (True, False, None):
            return None
        entries.append(Entry(key, places, identity, captioned, bad))
    return TarIndex(stamp, entries, [str(warning) for warning in values["warnings"]])


ARMS = {"lists": ListSource, "files": ShardSource}


def child(folder: Path) -> int:
    command = [sys.executable, __file__, "--memory", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def private_bytes(folder: str) -> int:
    """Memory that stays when shards are open and a few samples were read; not pages of files, which processes share."""
    ShardSource(folder)  # what is imported or made once
    gc.collect()
    before = private()
    source = ShardSource(folder)
    for index in range(0, len(source), max(1, len(source) // 100)):
        source.captions(index)
    gc.collect()
    return private() - before


def private() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


if __name__ == "__main__":
    main()

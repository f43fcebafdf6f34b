"""Makes a source of many rows, opens it, and says what it took beside a bare reading of the same bytes.

A script for `test_opening.py`, so that memory is that of one opening in a process of its own:

    python tests/scale/opening.py KIND ROWS FOLDER

Prints JSON: CPU seconds of opening and of the bare reading, bytes of memory that stay, bytes of ids and captions, and
bytes that a data worker would be sent.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import resource
import sys
import tarfile
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

from PIL import Image

from cmapkd.data.open import open_source


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 40)).save(file, "PNG")
    return file.getvalue()


def caption(number: int) -> str:
    return f"a caption of picture number {number} with some words"


def make_tar(path: Path, rows: int) -> None:
    shown = picture()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(rows):
            for end, content in (("png", shown), ("txt", caption(number).encode())):
                member = tarfile.TarInfo(f"{number:08d}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def read_tar(path: Path) -> None:
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.name.endswith(".txt"):
                file = tar.extractfile(member)
                assert file is not None
                file.read().decode()


def make_jsonl(path: Path, rows: int) -> None:
    (path.parent / "one.png").write_bytes(picture())
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = {"id": f"sample-{number:08d}", "image": "one.png", "caption": caption(number)}
            file.write(json.dumps(row) + "\n")


def read_jsonl(path: Path) -> None:
    with path.open(encoding="utf-8") as file:
        for line in file:
            json.loads(line)


def make_csv(path: Path, rows: int) -> None:
    shown = path.parent / "shown.png"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("filepath", "title"))
        for number in range(rows):
            if number % 50_000 == 0:  # a file system bounds how many names a file may have
                shown = path.parent / f"shown-{number}.png"
                shown.write_bytes(picture())
            os.link(shown, path.parent / f"{number:08d}.png")
            writer.writerow((f"{number:08d}.png", caption(number)))


def read_csv(path: Path) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        for _ in csv.reader(file, delimiter="\t"):
            pass


def make_parquet(path: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": picture(), "path": None}] * rows, kind)
    ids = [f"sample-{number:08d}" for number in range(rows)]
    captions = [caption(number) for number in range(rows)]
    pq.write_table(pa.table({"id": ids, "image": images, "caption": captions}), path, row_group_size=10_000)


def read_parquet(path: Path) -> None:
    import pyarrow.parquet as pq

    for column in ("id", "caption"):
        pq.read_table(path, columns=[column]).column(column).to_pylist()


def link_pictures(folder: Path, rows: int, name: str) -> None:
    """Many names of few files: a file system bounds how many names a file may have."""
    folder.mkdir(exist_ok=True)
    shown = folder.with_suffix(".png")
    for number in range(rows):
        if number % 50_000 == 0:
            shown = folder.with_name(f"{folder.name}-{number}.png")
            shown.write_bytes(picture())
        os.link(shown, folder / name.format(number))


def make_folder(path: Path, rows: int) -> None:
    link_pictures(path, rows, "{:08d}.png")
    for number in range(rows):
        (path / f"{number:08d}.txt").write_text(caption(number), encoding="utf-8")


def read_folder(path: Path) -> None:
    for entry in os.scandir(path):
        if entry.name.endswith(".txt"):
            Path(entry.path).read_text(encoding="utf-8")


def make_classes(path: Path, rows: int) -> None:
    path.mkdir()
    for number in range(100):
        link_pictures(path / f"class {number:02d}", rows // 100, "{:08d}.png")
        for shown in path.glob("*.png"):
            shown.unlink()


def read_classes(path: Path) -> None:
    for folder in os.scandir(path):
        for _ in os.scandir(folder.path):
            pass


def make_flickr(path: Path, rows: int) -> None:
    link_pictures(path.parent / "images", rows, "{:08d}.jpg")
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{number:08d}.jpg#0\t{caption(number)}\n" for number in range(rows))


def read_flickr(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        line.split("\t")


def make_coco(path: Path, rows: int) -> None:
    link_pictures(path.parent / "images", rows, "{:012d}.jpg")
    images = [{"id": number, "file_name": f"{number:012d}.jpg", "width": 8, "height": 8} for number in range(rows)]
    captions = [{"id": number, "image_id": number, "caption": caption(number)} for number in range(rows)]
    path.write_text(json.dumps({"images": images, "annotations": captions}), encoding="utf-8")


def read_coco(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


KINDS: dict[str, tuple[str, str, Callable[[Path, int], None], Callable[[Path], None]]] = {
    "tar": ("webdataset:{}", "rows.tar", make_tar, read_tar),
    "jsonl": ("jsonl:{}", "rows.jsonl", make_jsonl, read_jsonl),
    "csv": ("csv:{}", "rows.csv", make_csv, read_csv),
    "parquet": ("parquet:{}", "rows.parquet", make_parquet, read_parquet),
    "folder": ("folder:{}", "rows", make_folder, read_folder),
    "classes": ("folder:{}", "rows", make_classes, read_classes),
    "flickr30k": ("flickr30k:{},{}/images", "rows.token", make_flickr, read_flickr),
    "coco": ("coco:{},{}/images", "rows.json", make_coco, read_coco),
}


def resident() -> int:
    """Bytes of this process that are its own: not of files that it maps."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Private_Dirty"].split()[0]) * 1024


def main(kind: str, rows: int, folder: Path) -> None:
    spec, name, make, read = KINDS[kind]
    path = folder / name
    make(path, rows)
    start = time.process_time()
    read(path)
    bare = time.process_time() - start
    small = folder / "small"
    small.mkdir()
    make(small / name, 200)
    captioned = kind != "classes"
    len(
        open_source(spec.format(small / name, small), require_captions=captioned)
    )  # imports and first calls are not counted
    gc.collect()
    before, start = resident(), time.process_time()
    source = open_source(spec.format(path, folder), require_captions=captioned)
    opened = time.process_time() - start
    gc.collect()
    kept = resident() - before
    assert len(source) == rows
    text = sum(len(caption(number)) + len("sample-00000000") for number in range(rows))
    sent = len(ForkingPickler.dumps(source))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(
        json.dumps({"bare": bare, "opened": opened, "kept": kept, "text": text, "sent": sent, "peak": peak}) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

"""Malformed inputs by kind: archives, pictures, captions, tables, recipes, caches, checkpoints, model folders.

A kind writes one input into a folder, as a pure function of a `random.Random`, and returns the attempt to read it the
way a run would. The attempt says how many samples it read and how many were skipped as bad, or raises.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import struct
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from damage import HTML, MARKUP, TERMINAL, change, not_utf8, odd_json, odd_text, odd_value, spoil
from guard import Outcome, WrongResult, judge
from PIL import Image
from safetensors.torch import save, save_file

from cmapkd.cache.folder import CacheFolder
from cmapkd.cache.reader import CacheReader
from cmapkd.cache.verify import describe, verify
from cmapkd.compare import load_comparison, make_plan
from cmapkd.config import apply_overrides, load_config
from cmapkd.data import shard_index
from cmapkd.data.check import SampleLedger
from cmapkd.data.images import decode_image
from cmapkd.data.open import open_source
from cmapkd.data.types import BadSampleError, Source
from cmapkd.models import build_model, load_model
from cmapkd.models.packaged import packaged_models
from cmapkd.results import RunResult
from cmapkd.run import RunConfig
from cmapkd.training.checkpoint import Progress, checkpoint_path, read_checkpoint, write_checkpoint
from cmapkd.training.trackers import JsonlTracker

Attempt = Callable[[], tuple[int, int]]
Kind = Callable[[Random, Path], Attempt]


def outcome(kind: str, seed: int) -> Outcome:
    """Writes input number `seed` of a kind into a folder of its own, reads it, and says how that ended."""
    tokenized(["libraries make folders of their own when they are first used"])
    with tempfile.TemporaryDirectory(prefix="cmapkd-fuzz-") as name:
        folder = Path(name) / "own" / "run"
        folder.mkdir(parents=True)
        attempt = KINDS[kind](Random(f"{kind} {seed}"), folder)
        return judge(attempt, folder)


# ------------------------------------------------------------------------------------------- reading as a run would


def reads(
    spec: str, *, captions: Mapping[str, str] | None = None, also: tuple[tuple[str, ...], ...] = (), **options: Any
) -> Attempt:
    """Opens a source and reads every sample; `captions` are those of samples that nothing was done to, `also` what else
    the data themselves may say of them."""

    def attempt() -> tuple[int, int]:
        source = open_source(spec, **options)
        found, skipped = read_all(source)
        for sample_id, caption in (captions or {}).items():
            if found.get(sample_id) not in (None, (caption,), *also):
                raise WrongResult(f"{sample_id} has {str(found[sample_id])[:80]}, not {caption!r}")
        return len(found), skipped

    return attempt


def read_all(source: Source) -> tuple[dict[str, tuple[str, ...]], int]:
    """Captions of all readable samples, and how many were skipped; the ledger and its summary are written too."""
    from rich.console import Console

    found: dict[str, tuple[str, ...]] = {}
    ledger = SampleLedger()
    bad: list[tuple[str, str]] = []
    for index in range(len(source)):
        try:
            sample = source[index]
        except BadSampleError as error:
            if not error.reason:
                raise WrongResult(f"{error.sample_id} is skipped without a reason") from None
            bad.append((error.sample_id, error.reason))
            continue
        check_sample(sample)
        found[sample.id] = sample.captions
    ledger.add(len(found), bad)
    ledger.write(Path())
    Console(file=io.StringIO(), force_terminal=True).print(ledger.summary(), markup=False)
    source.fingerprint()
    if bad:
        tokenized([text for texts in found.values() for text in texts][:4])
    return found, len(bad)


def check_sample(sample: Any) -> None:
    if sample.image.mode != "RGB" or min(sample.image.size) < 1:
        raise WrongResult(f"a picture of mode {sample.image.mode} and size {sample.image.size}")
    for text in (*sample.captions, *(text for each in sample.texts.values() for text in each)):
        if not isinstance(text, str) or not text.strip():
            raise WrongResult(f"caption {text!r}")
        text.encode()  # a lone surrogate is no text
    if sample.label is not None and not (isinstance(sample.label, int) and 0 <= sample.label < 2**31):
        raise WrongResult(f"label {sample.label!r}")
    for box in sample.boxes:
        if not all(map(math.isfinite, (box.x, box.y, box.width, box.height))) or min(box.width, box.height) < 0:
            raise WrongResult(f"box {box}")


def tokenized(texts: list[str]) -> None:
    """Through the tokenizers of the packaged model and of CLIP, as a batch would."""
    for tokenizer in _tokenizers() if texts else ():
        batch = tokenizer(texts)
        if batch.ids.shape[0] != len(texts) or int(batch.ids.max()) >= tokenizer.vocab_size or int(batch.ids.min()) < 0:
            raise WrongResult(f"token ids {batch.ids.shape} up to {int(batch.ids.max())} of {tokenizer.vocab_size}")


@cache
def _tokenizers() -> list[Any]:
    from cmapkd.models.open_clip_tokenizer import make_tokenizer

    return [load_model(next(iter(packaged_models().values()))).tokenizer, make_tokenizer({})]


# ------------------------------------------------------------------------------------------- what is spoiled


@cache
def picture(number: int = 0, form: str = "PNG", side: int = 12) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, form)
    return file.getvalue()


def pairs(count: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(count):
        members.append((f"{number:04}.png", picture(number)))
        members.append((f"{number:04}.json", json.dumps({"caption": f"number {number}"}).encode()))
    return members


def tar_of(members: Iterable[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zip_of(members: Iterable[tuple[str | zipfile.ZipInfo, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a name comes twice
        for member, data in members:
            archive.writestr(zipfile.ZipInfo(member) if isinstance(member, str) else member, data)
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def images_in(folder: Path, names: Iterable[str]) -> None:
    for number, name in enumerate(names):
        write(folder / name, picture(number))


# ------------------------------------------------------------------------------------------- archives


def damaged_tar(draws: Random, folder: Path) -> Attempt:
    form = draws.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))
    write(folder / "a.tar", spoil(tar_of(pairs(4), form), draws))
    return reads("webdataset:a.tar", require_captions=draws.random() < 0.5)


def hostile_tar(draws: Random, folder: Path) -> Attempt:
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [*pairs(2)]
    for _ in range(draws.choice((1, 3))):
        members.insert(draws.randrange(len(members) + 1), _hostile_member(draws))
    data = tar_of(members, draws.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    if draws.random() < 0.3:  # a header whose size does not hold, with a checksum that does
        at = 512 * draws.randrange(8)
        size = draws.choice(
            (
                b"77777777777\0",
                b"-0000000001\0",
                b"00000000000\0",
                b"zzzzzzzzzzz\0",
                b"\x80" + b"\xff" * 11,
                b"\xff" * 12,
            )
        )
        header = bytearray(data[at : at + 512])
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data = data[:at] + bytes(header) + data[at + 512 :]
    write(folder / "a.tar", data)
    # a second member of a name parts a sample in two, of which one has no caption; or it brings a caption of its own
    also = ((), ("escaped",))
    return reads("webdataset:a.tar", captions={"a/0000": "number 0", "a/0001": "number 1"}, also=also)


def _hostile_member(draws: Random) -> tuple[tarfile.TarInfo, bytes]:
    name = draws.choice((
        "../escape.png", "/tmp/escape.png", "a/../../escape.png", "..\\escape.png", "C:\\escape.png", "c:escape.png", "....png",
        "x" * 300 + ".png", "\udcff\udcfe.png", "nul\x01.png", "0000.png", "0000.json", "./0000.png", ".png", "a.", "dir/", "é.png",
        "0001.PNG", "0001.tar.gz.png", TERMINAL[:40] + ".png", "a/" * 120 + "b.png", HTML[:60] + ".png",
    ))  # fmt: skip
    info = tarfile.TarInfo(name)
    info.type = draws.choice((tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
                              tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE, b"Z"))  # fmt: skip
    if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = draws.choice(("/etc/passwd", "../../escape", "0000.png", "a"))
    data = draws.choice((picture(9), b"", b"not a picture", b'{"caption": "escaped"}'))
    return info, data if info.type in (tarfile.REGTYPE, tarfile.CONTTYPE) else b""


def tar_contents(draws: Random, folder: Path) -> Attempt:
    """A whole tar with odd records in it; its neighbours must be read as they are."""
    record = {"caption": "one", "id": "own", "label": 3, "question": "what?", "answer": "a", "qa": [["q", "a"]],
              "boxes": [{"x": 1, "y": 2, "width": 3, "height": 4, "name": "cat"}], "synthetic": ["made"]}  # fmt: skip
    odd = [
        ("odd.png", picture(7)),
        (
            draws.choice(("odd.json", "odd.json", "odd.syn.json")),
            odd_json(record, draws),
        ),
        (
            draws.choice(("odd.txt", "odd.cls")),
            draws.choice((odd_text(draws).encode("utf-8", "replace"), not_utf8(draws))),
        ),
    ]
    before, after = pairs(2)[:2], pairs(2)[2:]
    write(folder / "a.tar", tar_of([*before, *odd, *after]))
    return reads("webdataset:a.tar", captions={"a/0000": "number 0", "a/0001": "number 1"})


def tar_index_file(draws: Random, folder: Path) -> Attempt:
    """A spoiled index in the user's cache, or a spoiled table of the shards, is made anew, and never believed."""
    path = write(folder / "a.tar", tar_of(pairs(3)))

    def attempt() -> tuple[int, int]:
        status = path.stat()
        index = shard_index.index_file("a.tar", (status.st_size, status.st_mtime_ns))
        open_source("webdataset:a.tar")
        tables = [*index.parent.glob("*.set")]
        table = max(tables, key=lambda file: file.stat().st_mtime_ns)
        for file in draws.choice(([index], [table], [index, table])):
            file.write_bytes(spoil(file.read_bytes(), draws))
        try:
            return reads("webdataset:a.tar", captions={f"a/{number:04}": f"number {number}" for number in range(3)})()
        finally:
            index.unlink(missing_ok=True)
            table.unlink(missing_ok=True)

    return attempt


def damaged_zip(draws: Random, folder: Path) -> Attempt:
    write(
        folder / "a.zip",
        spoil(zip_of([(f"{n:04}.png", picture(n)) for n in range(4)] + [("0000.txt", b"number 0")]), draws),
    )
    return reads("folder:a.zip")


def hostile_zip(draws: Random, folder: Path) -> Attempt:
    members: list[tuple[str | zipfile.ZipInfo, bytes]] = [(f"{n:04}.png", picture(n)) for n in range(2)]
    for _ in range(draws.choice((1, 3))):
        info = zipfile.ZipInfo(draws.choice(("../escape.png", "/tmp/escape.png", "a/../../e.png", "..\\e.png", "0000.txt", "l.png",
                                             "C:\\e.png", "é.png", "x" * 5_000 + ".png", TERMINAL + ".png", "0001.txt", "b.json")))  # fmt: skip
        info.compress_type = draws.choice(
            (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
        )
        if draws.random() < 0.3:
            info.external_attr = 0o120777 << 16  # a link
        members.append(
            (
                info,
                draws.choice(
                    (picture(9), b"/etc/passwd", b"", b"\0" * (30 * 2**20), odd_text(draws).encode("utf-8", "replace"))
                ),
            )
        )
    data = bytearray(zip_of(members))
    if draws.random() < 0.5:  # the central directory lies about a size, a method, a flag or a place
        at = data.rfind(b"PK\1\2", 0, len(data) - 4)
        place, form = draws.choice(((24, "<I"), (20, "<I"), (10, "<H"), (8, "<H"), (42, "<I"), (16, "<I")))
        struct.pack_into(form, data, at + place, draws.choice((0, 1, 99, 0xFFFF, 2**30 if form == "<I" else 7)))
    write(folder / "a.zip", bytes(data))
    return reads("folder:a.zip")


# ------------------------------------------------------------------------------------------- pictures

FORMS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "JPEG2000", "AVIF")


def damaged_image(draws: Random, folder: Path) -> Attempt:
    data = picture(draws.randrange(8), draws.choice(FORMS), 64)
    for _ in range(draws.choice((1, 2, 4))):
        data = spoil(data, draws)
    return decodes(data)


def decodes(data: bytes, **options: Any) -> Attempt:
    def attempt() -> tuple[int, int]:
        try:
            image = decode_image(data, "it", **options)
        except BadSampleError as error:
            if len(error.reason) < 10:
                raise WrongResult(f"reason {error.reason!r}") from None
            return 0, 1
        if image.mode != "RGB" or min(image.size) < 1 or image.size[0] * image.size[1] > 178_956_970:
            raise WrongResult(f"{image.mode} {image.size}")
        return 1, 0

    return attempt


def hostile_image(draws: Random, folder: Path) -> Attempt:
    return decodes(draws.choice(_HOSTILE)(draws))


def _png(width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _text_chunk(size: int) -> bytes:
    content = b"Comment\0\0" + zlib.compress(b"\0" * size, 9)
    return struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))


_HOSTILE: tuple[Callable[[Random], bytes], ...] = (
    lambda draws: _png(draws.choice((2**31 - 1, 100_000, 2**32 - 1, 0)), draws.choice((2**31 - 1, 100_000, 0, 1))),
    lambda _: _png(12_000, 12_000, data=zlib.compress(b"\0" * (12_000 * 36_001), 1)[:50_000]),  # truncated, and large
    lambda _: _png(20_000, 20_000, data=zlib.compress(b"\0" * 1_000_000, 9)),
    lambda draws: _png(8, 8, data=zlib.compress(b"\0" * 10**7), depth=draws.choice((1, 2, 4, 8, 16, 3, 255)), colour=draws.choice((0, 2, 3, 4, 6, 7))),
    lambda _: _png(8, 8, data=zlib.compress(b"\0" * 200), extra=_text_chunk(100 * 2**20)),
    lambda _: b"",
    lambda draws: draws.randbytes(draws.choice((1, 7, 100, 10_000))),
    lambda draws: draws.choice((b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ls) run",
                                b"%PDF-1.4\n", HTML.encode(), b"PK\3\4" + bytes(100), b"\x7fELF" + bytes(100), b"#!/bin/sh\ntouch escape\n",
                                b"\xd7\xcd\xc6\x9a" + bytes(60), b"/* XPM */", b"MM\0*" + bytes(20), b"GIF89a\xff\xff\xff\xff" + bytes(9))),
    lambda _: _saved(Image.new("CMYK", (9, 9), (1, 2, 3, 4)), "JPEG"),
    lambda draws: _saved(Image.fromarray(np.full((9, 9), 60_000, np.uint16)), draws.choice(("PNG", "TIFF"))),
    lambda draws: _saved(Image.new(draws.choice(("F", "I")), (9, 9)), "TIFF"),
    lambda _: _saved(Image.new("RGB", (9, 9)), "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")] * 50),
    lambda draws: _saved(Image.new(draws.choice(("1", "L", "LA", "P", "RGBA")), (9, 9)), "PNG", exif=draws.randbytes(40)),
    lambda draws: _saved(Image.new("RGB", (9, 9)), "JPEG", exif=b"Exif\0\0" + draws.randbytes(200), icc_profile=draws.randbytes(10_000)),
    lambda draws: struct.pack("<HHHIH", 0, 0, 0, 0, 0)[:draws.choice((2, 12))],
    lambda _: b"P6\n999999999 999999999\n255\n" + bytes(100),
    lambda _: b"P6\n13000 13000\n255\n" + bytes(100),
    lambda _: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    lambda _: b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(40),
    lambda _: b"II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + bytes(100),
    lambda _: _saved(Image.new("L", (65_000, 1)), "PNG"),
    lambda _: _saved(Image.new("L", (13_377, 13_377)), "PNG"),  # just within the limit
)  # fmt: skip


def image_files(draws: Random, folder: Path) -> Attempt:
    """A folder of pictures: wrong extensions, folders and pipes and links where a file should be."""
    import os

    images_in(folder / "d", ["good.png"])
    write(folder / "d" / f"odd.{draws.choice(('jpg', 'png', 'webp', 'tif', 'avif'))}", draws.choice(_HOSTILE)(draws))
    odd = folder / "d" / "place.png"
    draws.choice((
        lambda: odd.symlink_to("/dev/zero"), lambda: odd.symlink_to("nowhere"), lambda: odd.symlink_to("place.png"), lambda: os.mkfifo(odd),
        lambda: odd.symlink_to("/etc"), lambda: odd.write_bytes(b""), lambda: odd.symlink_to("/proc/self/mem"), lambda: odd.touch(0o000),
    ))()  # fmt: skip
    return reads("folder:d")


# ------------------------------------------------------------------------------------------- captions


def captions(draws: Random, folder: Path) -> Attempt:
    """Text files beside pictures, through the tokenizers and the run's ledger."""
    images_in(folder / "d", ["good.png", "odd.png"])
    write(folder / "d" / "good.txt", b"fine")
    text = odd_text(draws).encode("utf-8", "replace")
    text = draws.choice(
        (
            text,
            text,
            not_utf8(draws),
            text.decode().encode("utf-16"),
            b"\n" * 100_000,
            b"a\n" * 50_000,
            spoil(text, draws),
        )
    )
    write(folder / "d" / "odd.txt", text)

    def attempt() -> tuple[int, int]:
        source = open_source("folder:d", require_captions=True)
        found, skipped = read_all(source)
        if found.get("good.png") != ("fine",):
            raise WrongResult(str(found)[:100])
        tokenized([text for texts in found.values() for text in texts][:8])
        return len(found), skipped

    return attempt


# ------------------------------------------------------------------------------------------- annotations

_CAPTIONS = [{"image_id": n, "id": 10 + n, "caption": f"number {n}"} for n in range(3)]
COCO = {"images": [{"id": n, "file_name": f"{n}.png", "width": 12, "height": 12} for n in range(3)], "annotations": _CAPTIONS,
        "info": {}, "licenses": []}  # fmt: skip
INSTANCES = {
    "images": COCO["images"],
    "annotations": [
        {"image_id": n, "id": n, "category_id": n, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0} for n in range(3)
    ],
    "categories": [{"id": n, "name": f"kind {n}"} for n in range(3)],
}
KARPATHY = {"dataset": "coco", "images": [
    {"filename": f"{n}.png", "filepath": "", "split": split, "cocoid": n, "sentences": [{"raw": f"number {n}", "tokens": ["number"]}]}
    for n, split in enumerate(("train", "restval", "test"))
]}  # fmt: skip
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [{"question_id": n, "image_id": n, "question": "what?"} for n in range(3)],
}
ANSWERS = {"data_subtype": "val2014", "annotations": [
    {"question_id": n, "image_id": n, "answer_type": "other", "answers": [{"answer": "a", "answer_id": 1}], "multiple_choice_answer": "a"}
    for n in range(3)
]}  # fmt: skip
REGIONS = [
    {"id": n, "regions": [{"region_id": n, "phrase": f"number {n}", "x": 0, "y": 0, "width": 2, "height": 2}]}
    for n in range(3)
]
OBJECTS = [
    {"image_id": n, "objects": [{"object_id": n, "names": ["cat"], "x": 0, "y": 0, "w": 2, "h": 2}]} for n in range(3)
]
NAMES = [f"{number}.png" for number in range(3)]


def coco(draws: Random, folder: Path) -> Attempt:
    images_in(folder / "i", NAMES)
    first, second = json.dumps(COCO).encode(), json.dumps(INSTANCES).encode()
    both = draws.random() < 0.5
    if both and draws.random() < 0.7:
        second = odd_json(INSTANCES, draws)
    else:
        first = odd_json(COCO, draws)
    write(folder / "c.json", first)
    write(folder / "n.json", second)
    return reads("coco:c.json,n.json,i" if both else "coco:c.json,i")


def karpathy(draws: Random, folder: Path) -> Attempt:
    images_in(folder / "i", NAMES)
    write(folder / "k.json", odd_json(KARPATHY, draws))
    return reads(f"{draws.choice(('coco', 'flickr30k'))}:k.json,i@{draws.choice(('train', 'test'))}")


def flickr(draws: Random, folder: Path) -> Attempt:
    images_in(folder / "i", NAMES)
    form = draws.randrange(4)
    if form == 0:
        text = "raw,filename,split\n" + "".join(f'"[""number {n}""]",{n}.png,test\n' for n in range(3))
    elif form == 1:
        text = "image_name| comment_number| comment\n" + "".join(f"{n}.png| 0| number {n}\n" for n in range(3))
    elif form == 2:
        text = "image,caption\n" + "".join(f"{n}.png,number {n}\n" for n in range(3))
    else:
        text = "".join(f"{n}.png#0\tnumber {n}\n" for n in range(3))
    write(folder / "f.txt", _odd_table(text, draws))
    return reads("flickr30k:f.txt,i" + "@test" * (form == 0))


def vqa(draws: Random, folder: Path) -> Attempt:
    images_in(folder / "i", NAMES)
    odd_questions = draws.random() < 0.5
    write(folder / "q.json", odd_json(QUESTIONS, draws) if odd_questions else json.dumps(QUESTIONS).encode())
    write(folder / "a.json", json.dumps(ANSWERS).encode() if odd_questions else odd_json(ANSWERS, draws))
    return reads("vqa:q.json,a.json,i" if draws.random() < 0.8 else "vqa:q.json,i")


def visual_genome(draws: Random, folder: Path) -> Attempt:
    for number, name in enumerate(NAMES):
        write(folder / "i" / name.replace("png", "jpg"), picture(number, "JPEG"))
    odd_regions = draws.random() < 0.5
    write(folder / "r.json", odd_json(REGIONS, draws) if odd_regions else json.dumps(REGIONS).encode())
    write(folder / "o.json", json.dumps(OBJECTS).encode() if odd_regions else odd_json(OBJECTS, draws))
    return reads("visual_genome:r.json,o.json,i" if draws.random() < 0.7 else "visual_genome:r.json,i")


def jsonl(draws: Random, folder: Path) -> Attempt:
    images_in(folder / "i", NAMES)
    good = [{"image": f"i/{n}.png", "caption": f"number {n}"} for n in range(2)]
    row = {"image": "i/2.png", "captions": ["one", {"raw": "two"}], "id": 4, "label": 1, "qa": [["q", "a"]], "synthetic": "made",
           "boxes": [{"x": 1, "y": 2, "width": 3, "height": 4, "name": "cat"}]}  # fmt: skip
    odd = odd_json(row, draws).replace(b"\n", b" ")
    lines = [json.dumps(each).encode() for each in good]
    lines.insert(draws.randrange(3), odd)
    data = b"\n".join(lines)
    write(folder / "t.jsonl", spoil(data, draws) if draws.random() < 0.2 else data)
    return reads("jsonl:t.jsonl")


def table(draws: Random, folder: Path) -> Attempt:
    """CSV and TSV."""
    images_in(folder / "i", NAMES)
    separator = draws.choice((",", "\t", ";"))
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, lineterminator="\n")
    writer.writerow(["filepath", "title", "label"])
    for number in range(3):
        writer.writerow([f"i/{number}.png", f"number {number}", number])
    if draws.random() < 0.6:
        writer.writerow(
            draws.sample(
                ["i/0.png", odd_text(draws), "1", "../../../etc/passwd", str(odd_value(draws))], draws.randrange(1, 5)
            )
        )
    write(folder / "t.csv", _odd_table(file.getvalue(), draws))
    name = {",": "", "\t": "", ";": "?separator=semicolon"}[separator]
    quotes = draws.choice(("", "quotes=no"))
    return reads(f"csv:t.csv{name}" + (f"{'&' if name else '?'}{quotes}" if quotes else ""))


def _odd_table(text: str, draws: Random) -> bytes:
    data = text.encode("utf-8", "replace")
    how = draws.randrange(6)
    if how < 2:
        return spoil(data, draws)
    if how == 2:
        at = draws.randrange(len(data))
        return (
            data[:at]
            + draws.choice(
                (b'"', b'"""', b"\0", b"\r", b"\xff", b"\x1b[2J", b'\n"' + b"x" * 300_000, b"\n\n\n", b"," * 5_000)
            )
            + data[at:]
        )
    if how == 3:
        return data + odd_text(draws).encode("utf-8", "replace") + b"\n"
    if how == 4:
        return draws.choice(
            (
                b"",
                b"\n",
                data.split(b"\n")[0],
                text.encode("utf-16"),
                b"\xef\xbb\xbf" + data,
                data.replace(b"\n", b"\r"),
                not_utf8(draws),
            )
        )
    return data.replace(
        b"number 1", draws.choice((not_utf8(draws), MARKUP.encode(), TERMINAL.encode(), b"=cmd|' /C calc'!A0"))
    )


def classes(draws: Random, folder: Path) -> Attempt:
    """Class folders with a spoiled classes.json, or metadata.jsonl of a folder."""
    images_in(folder / "d", [f"n{number}/{number}.png" for number in range(3)])
    if draws.random() < 0.5:
        form: Any = draws.choice((
            {"n0": "cat", "n1": "dog", "n2": "cow"}, {"0": ["n0", "cat"], "1": ["n1", "dog"], "2": ["n2", "cow"]},
            {"n0": {"index": 0, "name": "cat"}, "n1": {"index": 1, "name": "dog"}, "n2": {"index": 2, "name": "cow"}},
        ))  # fmt: skip
        write(folder / "d" / "classes.json", odd_json(form, draws))
    else:
        rows = [json.dumps({"file_name": f"n{n}/{n}.png", "text": f"number {n}"}).encode() for n in range(2)]
        odd = odd_json({"file_name": "n2/2.png", "text": "two"}, draws).replace(b"\n", b" ")
        write(folder / "d" / "metadata.jsonl", b"\n".join([*rows, odd]))
    return reads("folder:d")


@cache
def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.table({
        "image": [{"bytes": picture(n), "path": f"{n}.png"} for n in range(4)], "caption": [f"number {n}" for n in range(4)],
        "label": [0, 1, 2, 3],
    })  # fmt: skip
    file = io.BytesIO()
    pq.write_table(rows, file)
    return file.getvalue()


def parquet(draws: Random, folder: Path) -> Attempt:
    write(folder / "t.parquet", spoil(_parquet(), draws))
    return reads("parquet:t.parquet")


def data_names(draws: Random, folder: Path) -> Attempt:
    """Names of sources themselves."""
    kind = draws.choice(("scenes", "webdataset", "folder", "csv", "jsonl", "parquet", "coco", "flickr30k", "vqa", "visual_genome",
                         "imagenet", "nothing", "", "hf:./none", "FOLDER"))  # fmt: skip
    rest = draws.choice((
        "", ":", ":..", ":{0..99999999999}.tar", ":{1..3", ":{a,{b}}", ":nowhere/*", ":[", ":**/**/**", ":\0", ":~nobody/x", ":a,b,c,d,e",
        ":" + odd_text(draws)[:3_000], "@", "@val@val", "?x=1", "?length=-1", "?length=99999999999999999999", "?size=0", "?limit=0", "?limit=²",
        ":pipe:touch escape", ":https://example.invalid/x.tar", ":/dev/zero", ":/dev/null", ":/proc/self/environ", "?wrong=nan", ":easy?wrong=9",
    ))  # fmt: skip
    return lambda: (len(open_source(kind + rest)), 0)


# ------------------------------------------------------------------------------------------- recipes

RECIPE = """teacher: tiny:scenes-teacher
student: tiny:small
method: {name: clip_kd, feature_weight: 2.0}
data: {train: scenes, val: scenes@val}
training: {steps: 10, batch_size: 16, stages: [{share: 1.0}]}
optim: {learning_rate: 0.001}
"""
_YAML = (
    "!!python/object/apply:os.system ['touch escape']", "!!python/object/new:os.system [touch escape]", "!!python/name:os.system",
    "!!python/module:os", "!!python/tuple [1, 2]", "!!binary aGFsbG8=", "!!set {a, b}", "!!timestamp 2001-12-14", "!custom {a: 1}",
    "${oc.env:HOME}", "${a}", "$ {x}", "&a [*a]", "*missing", "{a: 1, a: 2}", "[" * 3000, "{a: " * 2000, "? {x: y}\n: 1", "0x7fffffffffffffffff",
    "9" * 5000, ".nan", ".inf", "-.inf", "1e999", "yes", "~", "''", "\"\\ud800\"", "| \n  text\n", "2001-01-01", "0o777", "1_000", "1:30:00",
    "%YAML 9.9\n---\na: b", "a: b\n---\nc: d", "- a\n- b", "text", "\"../../../etc/passwd\"", "\u202e", "?", "@", "`",
)  # fmt: skip


def _bomb(draws: Random) -> str:
    """Aliases of aliases: `levels` doublings of ten."""
    levels = draws.choice((3, 6, 9, 12))
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def recipes(draws: Random, folder: Path) -> Attempt:
    lines = RECIPE.splitlines()
    how = draws.randrange(8)
    if how == 0:
        data = spoil(RECIPE.encode(), draws)
    elif how == 1:
        data = (RECIPE + _bomb(draws)).encode()
    elif how == 2:
        data = draws.choice(
            (
                b"",
                b"\0",
                not_utf8(draws),
                RECIPE.encode("utf-16"),
                b"base: r.yaml\n",
                b"base: [1]\n",
                b"base: ../r.yaml",
                b"base: /dev/zero",
            )
        )
    elif how == 3:
        import yaml

        data = yaml.safe_dump(_without_huge(change(yaml.safe_load(RECIPE), draws))).encode("utf-8", "replace")
    else:
        place = draws.randrange(len(lines))
        key = lines[place].partition(":")[0]
        lines[place] = f"{key}: {draws.choice(_YAML)}" if draws.random() < 0.7 else draws.choice(_YAML)
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
    write(folder / "r.yaml", data)

    def attempt() -> tuple[int, int]:
        config = load_config(RunConfig, "r.yaml")
        json.dumps(config.plain())
        return 1, 0

    return attempt


def _without_huge(values: Any) -> Any:
    """safe_dump writes no surrogates and no numbers of more than 4,300 digits."""
    if isinstance(values, dict):
        return {str(_without_huge(key)): _without_huge(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_huge(value) for value in values]
    return values.encode("utf-8", "replace").decode() if isinstance(values, str) else values


def overrides(draws: Random, folder: Path) -> Attempt:
    key = draws.choice(("training.steps", "method", "data.train", "student.options.width", "", "a..b", "a[0]", "optim.betas", ".", "training", "x" * 5000,
                        "seed", "training.stages", "more_teachers.a", "heads", "baseline"))  # fmt: skip
    value = draws.choice(
        (draws.choice(_YAML), odd_text(draws)[:5_000], str(odd_value(draws))[:5_000], "1", "{", "[1,2", "null")
    )
    text = draws.choice((f"{key}={value}", f"{key}", f"={value}", f"{key}={value}={value}"))
    return lambda: (
        (1, 0) if RunConfig.from_mapping(apply_overrides(_plain_recipe(), [text], where="recipe")) else (0, 0)
    )


def _plain_recipe() -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = yaml.safe_load(RECIPE)
    return values


COMPARISON: dict[str, Any] = {
    "base": "r.yaml", "seeds": [0, 1], "arms": {"alone": ["method=contrastive"], "taught": {"method.feature_weight": 3}},
    "axes": {"training.steps": [10, 20]}, "reference": "alone", "metrics": ["retrieval.mean_r@1"],
    "tables": {"one": {"arms": ["alone", "taught"]}},
}  # fmt: skip


def comparisons(draws: Random, folder: Path) -> Attempt:
    import yaml

    write(folder / "r.yaml", RECIPE.encode())
    how = draws.randrange(4)
    text = yaml.safe_dump(_without_huge(change(COMPARISON, draws) if how else COMPARISON))
    data = text.encode("utf-8", "replace")
    if how == 0:
        data = spoil(data, draws)
    elif how == 1:
        data += f"\nevaluate: {draws.choice(_YAML)}\n".encode("utf-8", "surrogatepass")
    write(folder / "c.yaml", data)

    def attempt() -> tuple[int, int]:
        plan = make_plan(load_comparison("c.yaml"))
        for run in plan.runs:
            if plan.folder(run, Path("out")).resolve().parent != Path("out/runs").resolve():
                raise WrongResult(f"run folder {plan.folder(run, Path('out'))}")
        return 1, 0

    return attempt


# ------------------------------------------------------------------------------------------- caches


@cache
def _kept() -> Path:
    """A folder with a whole cache, checkpoint folder and model folders, made once; removed with the process."""
    folder = tempfile.TemporaryDirectory(prefix="cmapkd-fuzz-kept-")
    _KEEP.append(folder)
    return Path(folder.name)


_KEEP: list[tempfile.TemporaryDirectory[str]] = []


@cache
def _cache() -> Path:
    from cmapkd.cache import CacheConfig, CachePlan, Wanted
    from cmapkd.data.views import ViewSpec
    from helpers import MemorySource, make_method

    config = CacheConfig(folder=_kept() / "cache", batch_size=4, shard_mib=0.0005, store="fp32")
    views = ViewSpec(crop_scale=(0.6, 1.0), flip=0.5, num_views=2)
    source = MemorySource(12, bad=(3,))
    keys = Wanted.of((), [*range(12), 13, 15, 19])  # a list, not a range
    plan = CachePlan.of_method(config, make_method("clip_kd"), source=source, views=views, keys=keys, precision="fp32")
    plan.build(device="cpu")
    return _kept() / "cache"


@cache
def _rows() -> dict[int, bytes]:
    return dict(_stored(CacheFolder.open(_cache())))


def _stored(folder: CacheFolder) -> Iterator[tuple[int, bytes]]:
    reader = CacheReader(folder)
    for view in range(2):
        for index in range(folder.length):
            if reader.has(view, index):
                number, shard, row = reader._find(view, index) or (0, 0, 0)
                yield view * folder.length + index, reader._rows(number, shard, (row,))[0].tobytes()


def _reads_cache() -> tuple[int, int]:
    """Every row that is read must be one that was written; a shard that does not count is as one that is not built."""
    folder = CacheFolder.open(Path("cache"))
    describe(folder)
    wrong = [problem for _, problem in verify(folder) if problem is not None]
    found = dict(_stored(folder))
    if any(_rows().get(key) != row for key, row in found.items()):
        raise WrongResult("a row differs from what was written")
    return len(found), len(wrong) + len(_rows()) - len(found)


def cache_manifests(draws: Random, folder: Path) -> Attempt:
    shutil.copytree(_cache(), folder / "cache")
    path = draws.choice(sorted((folder / "cache").rglob("*.json")))
    how = draws.randrange(4)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(spoil(path.read_bytes(), draws))
    else:  # odd, with a digest that fits: as another program, or a stranger, would have written it
        from cmapkd.cache.files import write_json

        values = json.loads(path.read_bytes())
        values.pop("digest")
        changed = change(values, draws)
        try:
            write_json(path, changed)
        except (UnicodeEncodeError, TypeError, AttributeError):
            path.write_bytes(odd_json(values, draws))
    return _reads_cache


def cache_shards(draws: Random, folder: Path) -> Attempt:
    shutil.copytree(_cache(), folder / "cache")
    files = sorted(path for path in (folder / "cache").rglob("*") if path.suffix in (".rows", ".bin"))
    path = draws.choice(files)
    how = draws.randrange(5)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(draws.choice(files).read_bytes())
    elif how == 2:
        path.unlink()
        draws.choice(
            (lambda: path.symlink_to("/etc/passwd"), path.mkdir, lambda: path.symlink_to("/dev/zero"), path.touch)
        )()
    else:
        path.write_bytes(spoil(path.read_bytes(), draws))
    return _reads_cache


# ------------------------------------------------------------------------------------------- checkpoints and weights


@cache
def _checkpoint() -> Path:
    torch.manual_seed(0)
    tensors = {
        "method": {"student.weight": torch.randn(8, 8), "student.bias": torch.randn(8)},
        "optimizer": {"0.exp_avg": torch.randn(8, 8), "0.step": torch.tensor(3.0)},
        "random-0": {"torch": torch.get_rng_state(), "python": torch.tensor([3, *range(625)])},
    }
    path = checkpoint_path(_kept() / "checkpoints", 3)
    write_checkpoint(path, tensors, Progress(step=3, ledger=SampleLedger().state_dict()))
    return path


def checkpoints(draws: Random, folder: Path) -> Attempt:
    shutil.copytree(_checkpoint(), folder / "step-000000003")
    path = draws.choice(sorted((folder / "step-000000003").iterdir()))
    how = draws.randrange(5)
    if how == 0:
        path.unlink()
    elif how == 1 and path.suffix == ".json":
        path.write_bytes(odd_json(json.loads(path.read_bytes()), draws))
    elif how == 2:
        path.write_bytes(draws.choice((_pickle(), save({"x": torch.ones(2)}), b"", odd_safetensors(draws))))
    else:
        path.write_bytes(spoil(path.read_bytes(), draws))

    def attempt() -> tuple[int, int]:
        tensors, progress = read_checkpoint(Path("step-000000003"))
        whole, before = read_checkpoint(_checkpoint())
        same = tensors.keys() == whole.keys() and all(
            tensors[name].keys() == group.keys()
            and all(torch.equal(tensors[name][key], value) for key, value in group.items())
            for name, group in whole.items()
        )
        if not same or progress != before:
            raise WrongResult("a checkpoint was read that is not the one that was written")
        return 1, 0

    return attempt


class Exploit:
    """Unpickled, it would write a file."""

    def __reduce__(self) -> Any:
        return (eval, ("open('escape', 'w').write('x')",))


def _pickle() -> bytes:
    import pickle

    return pickle.dumps(Exploit())


def odd_safetensors(draws: Random) -> bytes:
    """Headers with absurd sizes, places outside the file, overlaps, unknown types."""
    header: Any = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    entry = draws.choice((
        {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 16]}, {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "Q99", "shape": [4], "data_offsets": [0, 16]}, {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**18]}, {"dtype": "F32", "shape": [], "data_offsets": [0, 16]},
        {"dtype": "F64", "shape": [4], "data_offsets": [0, 16]}, {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 16]}, {}, None, [],
    ))  # fmt: skip
    header[draws.choice(("a", "b", "__metadata__", "../x"))] = entry
    text = json.dumps(header).encode()
    size = draws.choice((len(text), len(text), 0, 2**63, 2**64 - 1, len(text) + 100, 100_000_001))
    return struct.pack("<Q", size) + text + bytes(16)


@cache
def _model() -> Path:
    from helpers import make_model

    make_model().save(_kept() / "model")
    return _kept() / "model"


def model_folders(draws: Random, folder: Path) -> Attempt:
    """What describes a model: cmapkd.json and tokenizer.json."""
    shutil.copytree(_model(), folder / "model")
    path = folder / "model" / draws.choice(("cmapkd.json", "cmapkd.json", "tokenizer.json"))
    values = json.loads(path.read_bytes())
    how = draws.randrange(6)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(spoil(path.read_bytes(), draws))
    elif how == 2 and path.name == "cmapkd.json":
        values["family"] = draws.choice(("hf", "open_clip", "timm", "joined", "os", "../x", "", None, 5, ["tiny"]))
        path.write_text(json.dumps(values))
    elif how == 3 and path.name == "cmapkd.json":
        key = draws.choice(sorted(values["options"]))
        values["options"][key] = draws.choice((0, -1, 2**40, 10**12, 1.5, "x", None, [], True))
        path.write_text(json.dumps(values))
    else:
        path.write_bytes(odd_json(values, draws))
    return lambda: _loads(load_model, "model")


def _loads(load: Callable[[str], Any], name: str) -> tuple[int, int]:
    model = load(name)
    with torch.no_grad():
        tokens = model.tokenizer(["red cat", "green dog near tree"])
        model.encode_text(tokens)
        model.encode_image(torch.zeros(1, 3, model.image_spec.size, model.image_spec.size))
    return 1, 0


def weight_files(draws: Random, folder: Path) -> Attempt:
    """model.safetensors of a model folder."""
    shutil.copytree(_model(), folder / "model")
    path = folder / "model" / "model.safetensors"
    from safetensors.torch import load_file

    how = draws.randrange(6)
    if how == 0:
        path.write_bytes(odd_safetensors(draws))
    elif how == 1:
        path.write_bytes(_pickle())
    elif how == 2:
        weights = load_file(path)
        key = draws.choice(sorted(weights))
        weights[draws.choice((key, "other", "a/../b"))] = draws.choice((
            torch.zeros(3), torch.zeros(0), torch.zeros(1, dtype=torch.int64), torch.full_like(weights[key], float("nan")),
            weights[key].to(torch.float8_e4m3fn), torch.ones_like(weights[key], dtype=torch.bool),
        ))  # fmt: skip
        save_file(weights, path)
    elif how == 3:
        path.unlink()
        draws.choice((lambda: None, path.mkdir, lambda: path.symlink_to("nowhere"), path.touch))()
    else:
        path.write_bytes(spoil(path.read_bytes(), draws))
    return lambda: _loads(load_model, "model")


def torch_files(draws: Random, folder: Path) -> Attempt:
    """Files of torch.save as `checkpoint`, with objects, damage, or a pickle under the name of safetensors."""
    from helpers import make_model

    state = make_model(seed=1).state_dict()
    file = io.BytesIO()
    content: Any = draws.choice((
        state, {"state_dict": state}, {"model": Exploit()}, Exploit(), [1, 2], {"state_dict": 5}, {"epoch": 3, **state}, {1: torch.ones(2)},
    ))  # fmt: skip
    torch.save(content, file)
    data = file.getvalue()
    data = draws.choice((data, data, spoil(data, draws), _pickle(), b"", odd_safetensors(draws)))
    name = draws.choice(("w.pt", "w.bin", "w.safetensors", "w"))
    write(folder / name, data)
    return lambda: _loads(lambda _: build_model_with(name), name)


def build_model_with(name: str) -> Any:
    from helpers import make_model

    model = make_model()
    model.load_checkpoint(Path(name))
    return model


@cache
def _hf() -> Path:
    """A tiny CLIP in transformers' format."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    from helpers import tokenizer

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "projection_dim": 8,
    }
    native = PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, bos_token="[START]", eos_token="[END]", pad_token="[PAD]", unk_token="[UNK]")  # fmt: skip
    text = {
        **sizes,
        "vocab_size": 128,
        "max_position_embeddings": 12,
        "eos_token_id": 3,
        "bos_token_id": 2,
        "pad_token_id": 0,
    }
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8)
    folder = _kept() / "hf"
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    native.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def hf_folders(draws: Random, folder: Path) -> Attempt:
    """A folder in transformers' format that is damaged, or names code of its own."""
    shutil.copytree(_hf(), folder / "model")
    how = draws.randrange(6)
    config = folder / "model" / "config.json"
    if how == 0:  # code of its own, which must not be run
        values = json.loads(config.read_bytes())
        values |= {"auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
        values["model_type"] = draws.choice(("clip", "own", "llava"))
        config.write_text(json.dumps(values))
        write(
            folder / "model" / "code.py",
            b"open('escape', 'w').write('x')\nfrom transformers import CLIPConfig as Config, CLIPModel as Model\n",
        )
    elif how == 1:
        (folder / "model" / "model.safetensors").unlink()
        write(folder / "model" / "pytorch_model.bin", _pickle())
    elif how == 2:
        weights = folder / "model" / "model.safetensors"
        weights.write_bytes(draws.choice((odd_safetensors(draws), _pickle(), spoil(weights.read_bytes(), draws))))
    elif how == 3:
        values = json.loads(config.read_bytes())
        part = draws.choice(("text_config", "vision_config"))
        values[part][draws.choice(sorted(values[part]))] = odd_value(draws)
        config.write_text(json.dumps(values))
    else:
        path = draws.choice(sorted(path for path in (folder / "model").iterdir() if path.suffix == ".json"))
        path.write_bytes(odd_json(json.loads(path.read_bytes()), draws))
    return lambda: _loads(lambda name: build_model(f"hf:{name}"), "./model")


OPEN_CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 8, "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "shortest"},
}  # fmt: skip


def open_clip_folders(draws: Random, folder: Path) -> Attempt:
    write(
        folder / "model" / "open_clip_config.json",
        odd_json(OPEN_CLIP, draws) if draws.random() < 0.7 else json.dumps(OPEN_CLIP).encode(),
    )
    name = draws.choice(("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors"))
    write(folder / "model" / name, draws.choice((odd_safetensors(draws), _pickle(), b"", draws.randbytes(500))))
    scratch = draws.random() < 0.7
    config = {"name": "open_clip:model", "init": "scratch" if scratch else "auto"}
    from cmapkd.models import ModelConfig

    return lambda: _loads(lambda _: build_model(ModelConfig.from_mapping(config)), "model")


# ------------------------------------------------------------------------------------------- run folders


def run_folders(draws: Random, folder: Path) -> Attempt:
    """What is read back of a run: its scores, its lines, its list of bad samples in a checkpoint."""
    scores = {
        "retrieval": {"i2t": {"r@1": 1.0, "r@5": 2.0}, "t2i": {"r@1": 1.0, "r@5": 2.0}, "mean_r@1": 1.0},
        "params": 5,
    }
    metrics = {"teacher": scores, "student": scores, "baseline": None, "baseline_name": None, "gap_closed": None, "method": MARKUP,
               "evaluated_on": TERMINAL}  # fmt: skip
    which = draws.randrange(3)
    if which == 0:
        write(folder / "metrics.json", odd_json(metrics, draws))
        return lambda: _prints(RunResult.read(Path()))
    if which == 1:
        lines = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(4)]
        lines.insert(draws.randrange(5), odd_json({"step": 2, "loss": 1.0}, draws).replace(b"\n", b" "))
        write(folder / "metrics.jsonl", b"\n".join(lines))
        return _reopens
    state = {"num_good": 3, "num_bad": 1, "num_without_caption": 0, "kinds": {"a": 1}, "bad": [["id", "a: b"]]}
    path = write(folder / "state.json", json.dumps(change(state, draws)).encode("utf-8", "surrogatepass"))

    def attempt() -> tuple[int, int]:
        SampleLedger().load_state_dict(json.loads(path.read_bytes()))
        return 1, 0

    return attempt


def _reopens() -> tuple[int, int]:
    JsonlTracker(Path("metrics.jsonl"), resume_step=2).close()
    lines = [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]
    if not all(isinstance(line, dict) and line["step"] <= 2 for line in lines):
        raise WrongResult("a line after the step was kept")
    return len(lines), 5 - len(lines)


def _prints(result: RunResult) -> tuple[int, int]:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=200, force_terminal=False).print(result.table())
    if "\x1b[2J" in text.getvalue():
        raise WrongResult("a terminal's escape came through")
    return 1, 0


KINDS: dict[str, Kind] = {
    "tar, damaged": damaged_tar,
    "tar, hostile members": hostile_tar,
    "tar, odd records": tar_contents,
    "tar, index file": tar_index_file,
    "zip, damaged": damaged_zip,
    "zip, hostile members": hostile_zip,
    "image, damaged": damaged_image,
    "image, hostile": hostile_image,
    "image files": image_files,
    "captions": captions,
    "COCO JSON": coco,
    "Karpathy JSON": karpathy,
    "Flickr tables": flickr,
    "VQA JSON": vqa,
    "Visual Genome JSON": visual_genome,
    "JSON lines": jsonl,
    "CSV and TSV": table,
    "classes and metadata": classes,
    "parquet": parquet,
    "names of data": data_names,
    "YAML recipes": recipes,
    "overrides": overrides,
    "comparison files": comparisons,
    "cache manifests": cache_manifests,
    "cache shards": cache_shards,
    "checkpoints": checkpoints,
    "model folders": model_folders,
    "weight files": weight_files,
    "torch files": torch_files,
    "transformers folders": hf_folders,
    "open_clip folders": open_clip_folders,
    "run folders": run_folders,
}

"""Reading pictures and captions from tars, beside webdataset: `python benchmarks/reading.py TAR --json out.json`.

All arms read the same samples of one tar in one process without workers: picture, random crop to 224 pixels, caption,
CLIP's tokens. `cmapkd` makes batches of bytes, as its data workers do; `fast` is the same with `data.views.reading:
fast`. `webdataset` is the loop that open_clip trains with: its decoder, open_clip's training transform to normalised
float32, its tokenizer, a stack for each batch. The arms take turns, a pass over the tar each. Counted is CPU time.
webdataset is no dependency of the project:

    uv run --with webdataset python benchmarks/reading.py TAR --samples 64 --json docs/results/reading.json
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from cmapkd.data.batches import BatchBuilder
from cmapkd.data.open import open_source
from cmapkd.data.plans import Plan
from cmapkd.data.readers import DualReader
from cmapkd.data.views import ViewSpec
from cmapkd.models import ImageSpec
from cmapkd.models.fast_images import FastPixels
from cmapkd.models.open_clip_tokenizer import make_tokenizer
from retrieval import processor

SIZE, BATCH = 224, 32


def enlarged(tar: Path, side: int, samples: int, folder: Path) -> Path:
    """The first samples with a caption in a `txt`, their pictures with a long side of `side` pixels; 0: as they are."""
    made = folder / f"{side}.tar"
    with tarfile.open(tar) as read, tarfile.open(made, "w") as write:
        members = iter(read)
        for _ in range(samples):
            picture, about = (next(members) for _ in range(2))
            key = picture.name.rpartition(".")[0]
            data = read.extractfile(picture).read()  # type: ignore[union-attr]
            said = json.load(read.extractfile(about))  # type: ignore[arg-type]
            if side:
                image = Image.open(io.BytesIO(data)).convert("RGB")
                scale = side / max(image.size)
                image = image.resize(
                    (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
                )
                image.save(file := io.BytesIO(), "JPEG", quality=90)
                data = file.getvalue()
            for name, content in (
                ("jpg", data),
                ("txt", said["captions"][0].encode()),
                ("json", json.dumps(said).encode()),
            ):
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                write.addfile(info, io.BytesIO(content))
    return made


def ours(tar: Path, *, fast: bool) -> Callable[[], int]:
    source = open_source(f"webdataset:{tar}")
    tokenizer = make_tokenizer({"context_length": 77})
    pixels = FastPixels(ImageSpec(SIZE)) if fast else ImageSpec(SIZE)
    builder = BatchBuilder(source, ViewSpec(), {"student": DualReader(pixels, tokenizer)}, seed=0)

    def read() -> int:
        pictures = 0
        for step in range(len(source) // BATCH):
            mine = tuple(range(step * BATCH, (step + 1) * BATCH))
            pictures += len(builder[Plan(step, 0, mine, mine)].pairs("student").images)
        return pictures

    return read


def theirs(tar: Path) -> Callable[[], int]:
    import open_clip
    import webdataset

    transform = open_clip.image_transform(SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def read() -> int:
        data = webdataset.WebDataset(str(tar), shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
        pairs = data.map_tuple(transform, lambda text: tokenizer(text)[0]).batched(BATCH, partial=False)
        return sum(len(images) for images, _ in pairs)

    return read


def measure(tar: Path, rounds: int) -> dict[str, Any]:
    """Pictures a CPU second, medians over the rounds, and ratios round by round."""
    arms = {"cmapkd": ours(tar, fast=False), "fast": ours(tar, fast=True), "webdataset": theirs(tar)}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):  # the first one warms up
        for name, read in arms.items():
            start = time.process_time()
            pictures = read()
            if number:
                rates[name].append(pictures / (time.process_time() - start))
    found: dict[str, Any] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    for name, one, other in (
        ("ratio", "cmapkd", "webdataset"),
        ("fast_over_webdataset", "fast", "webdataset"),
        ("fast_over_exact", "fast", "cmapkd"),
    ):
        ratios = [a / b for a, b in zip(rates[one], rates[other], strict=True)]
        found[name] = {
            "median": round(statistics.median(ratios), 2),
            "lowest": round(min(ratios), 2),
            "highest": round(max(ratios), 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tar", type=Path, help="with pairs of jpg and json, whose captions are a list")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "size": SIZE,
        "samples": options.samples,
        "rounds": options.rounds,
        "unit": "pictures a CPU second",
        "processor": processor(),
    }
    with TemporaryDirectory() as folder:
        for name, side in (("as_they_are", 0), ("long_side_512", 512)):
            result[name] = measure(enlarged(options.tar, side, options.samples, Path(folder)), options.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

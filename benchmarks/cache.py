"""The teacher's cache: rows read back a second and core, what building adds to the teacher's own time, bytes a row.

    uv run python benchmarks/cache.py --json docs/results/cache.json
    uv run python benchmarks/cache.py --teacher open_clip:ViT-L-14 --rows 512

The samples are noise of the teacher's size, ready in memory: teacher and cache are measured, not decoding. Levels
are those that CMAPKD taps. Reading is measured in batches of 256 in random order, in one thread, checks included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cmapkd.cache import CacheConfig, CachePlan, CacheReader, all_keys, describe
from cmapkd.cache.asked import AskedTowers
from cmapkd.cache.chunks import Chunks, spans_of
from cmapkd.cache.files import write_json
from cmapkd.cache.folder import CacheFolder
from cmapkd.cache.identity import row_check
from cmapkd.cache.layout import DETAILS, Field, RowLayout
from cmapkd.cache.parts import CachePart
from cmapkd.cache.rows import CHECK, live_features
from cmapkd.data.readers import DualReader
from cmapkd.data.texts import TextChoice
from cmapkd.data.types import ModelInput, Sample
from cmapkd.data.views import WHOLE
from cmapkd.features.taps import language_taps, visual_taps
from cmapkd.models import FrozenTeacher, LevelRequest, build_model
from cmapkd.provenance import describe_environment

BATCH = 256


class Ready:
    """The same picture under as many names as needed."""

    name = "ready"
    class_names: Sequence[str] | None = None

    def __init__(self, length: int, size: int) -> None:
        self.length = length
        self.image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return Sample(str(index), self.image, self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"a photo of {index} dogs on a beach",)

    def fingerprint(self) -> str:
        return "ready"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny:scenes-teacher")
    parser.add_argument("--rows", type=int, default=2048, help="answered by the teacher")
    parser.add_argument("--read-rows", type=int, default=100_000, help="in the cache that is read back")
    parser.add_argument("--kinds", nargs="+", default=["global", "pooled"], choices=[*DETAILS])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(arguments.teacher)
    teacher = FrozenTeacher(model).to(device)
    source = Ready(arguments.rows, model.image_spec.size)
    result: dict[str, Any] = {
        "teacher": arguments.teacher,
        "rows": arguments.rows,
        "device": device,
        "caches": [],
        "vit_l14_rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.kinds:
            for store in ("fp32", "fp16", "int8"):
                place = Path(folder) / f"{kind}-{store}"
                result["caches"].append(measure(teacher, source, kind, store, place, arguments.read_rows))
        for kind in ("global", "pooled"):
            for store in ("fp16", "int8"):
                result["vit_l14_rows"].append(vit_l14(kind, store, Path(folder) / f"vit-{kind}-{store}"))
    result["environment"] = describe_environment()
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(
    teacher: FrozenTeacher, source: Ready, kind: Any, store: Any, folder: Path, read_rows: int
) -> dict[str, Any]:
    model = teacher.model
    device = next(model.parameters()).device
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter  # the process's own time, whatever else runs
    taps = [
        tuple(dict.fromkeys(info.name for info in taken.values()))
        for taken in (visual_taps(model.image_levels), language_taps(model.text_levels))
    ]
    needs = LevelRequest() if kind == "global" else LevelRequest(*taps)
    config = CacheConfig(folder=folder, store=store, max_gib=1e6)
    plan = CachePlan(config, teacher, AskedTowers(needs, kind), source, WHOLE, all_keys(len(source), 1), "fp32")
    _ = plan.identity, plan.layout
    batch = config.batch_size
    images = model.image_spec(source.image).repeat(batch, 1, 1, 1)
    inputs = ModelInput(images, model.tokenizer([source.captions(i)[0] for i in range(batch)])).to(device)

    def forward(times: int) -> float:
        start = clock()
        for _ in range(times):
            live_features(teacher, inputs, needs, "fp32").image.embedding.sum().item()
        return (clock() - start) / (times * batch)

    forward(1)
    times = max(1, len(source) // batch)
    before = forward(times)
    start = clock()
    plan.build(device=device)
    build = (clock() - start) / len(source)
    live = (before + forward(times)) / 2  # of both sides, as the machine may have become slower or faster
    part = CacheFolder.open(folder).parts()[0]
    chunks = Chunks(source, WHOLE, DualReader(model.image_spec, model.tokenizer), [part], TextChoice())
    start = clock()
    for place in spans_of(part, 0, range(part.num_shards)):  # what data workers do beside the teacher; here none do
        chunks[place]
    data = (clock() - start) / len(source)
    fidelity = describe(CacheFolder.open(folder))["fidelity"]
    return {
        "kind": kind,
        "store": store,
        "bytes_per_row": plan.layout.row_bytes,
        "teacher_ms": round(1000 * live, 4),
        "build_ms": round(1000 * build, 4),
        "data_ms": round(1000 * data, 4),
        "build_without_data_over_teacher": round((build - data) / live, 3),
        "rows_read_per_second_and_core": round(reading(plan, read_rows)),
        "cosine_mean": {name: round(value, 7) for name, value in fidelity["cosine_mean"].items()},
        "same_nearest": fidelity["same_nearest"],
    }


def vit_l14(kind: Any, store: Any, folder: Path, rows: int = 20_000) -> dict[str, Any]:
    """Reading rows of the widths of ViT-L/14, filled with zeros: no teacher is needed for that."""
    image, text = Field("image", None, (768,)), Field("text", None, (768,))
    levels = [Field("image", f"blocks.{n}", (1024,)) for n in (5, 15, 23)]
    levels += [Field("text", f"blocks.{n}", (768,)) for n in (3, 7, 11)]
    layout = RowLayout(kind, store, (image, text, *(levels if kind == "pooled" else ())))
    cache = CacheFolder.create(
        folder, identity={}, layout=layout, about={}, logit_scale=1.0, logit_bias=None, length=rows
    )
    cache.add_part(np.arange(rows, dtype=np.int64), number=0, batch_size=128, shard_bytes=64 * 2**20)
    part: CachePart = cache.parts()[0]
    captions = [f"a photo of {index} dogs on a beach" for index in range(rows)]
    for shard in range(part.num_shards):
        first, last = part.extent(shard)
        of_shard = np.zeros(last - first, layout.dtype)
        of_shard[CHECK] = [row_check(str(index), 0, captions[index]) for index in range(first, last)]
        of_shard.tofile(part.data(shard))
        record = {"rows": last - first, "bad": 0, "checksum": part.checksum(shard), "fidelity": {}}
        write_json(part.record(shard), record)
    return {
        "kind": kind,
        "store": store,
        "bytes_per_row": layout.row_bytes,
        "rows_read_per_second_and_core": round(read_all(CacheReader(cache), captions)),
    }


def reading(plan: CachePlan, rows: int) -> float:
    """Rows a second of a larger cache of the same layout, filled with copies of the built rows."""
    built = CacheFolder.open(plan.folder)
    original = CacheReader(built).parts[0]
    data = np.concatenate([np.fromfile(original.data(n), built.layout.dtype) for n in range(original.num_shards)])
    large = CacheFolder.create(
        plan.folder.with_name(f"{plan.folder.name}-large"),
        **{key: value for key, value in vars(built).items() if key not in ("path", "length")},
        length=rows,
    )
    large.add_part(np.arange(rows, dtype=np.int64), number=0, batch_size=plan.config.batch_size, shard_bytes=64 * 2**20)
    part: CachePart = large.parts()[0]
    captions = [f"a photo of {index} dogs on a beach" for index in range(rows)]
    for shard in range(part.num_shards):
        first, last = part.extent(shard)
        part_rows = data[np.arange(first, last) % len(data)]
        part_rows[CHECK] = [row_check(str(index), 0, captions[index]) for index in range(first, last)]
        part_rows.tofile(part.data(shard))
        record = {"rows": last - first, "bad": 0, "checksum": part.checksum(shard), "fidelity": {}}
        write_json(part.record(shard), record)
    return read_all(CacheReader(replace(large), check="first_use"), captions)


def read_all(reader: CacheReader, captions: list[str]) -> float:
    """Rows a second, in random order, once the checksums are compared."""
    rows = len(captions)
    order = np.random.default_rng(0).permutation(rows).tolist()
    batches = [order[at : at + BATCH] for at in range(0, rows - BATCH + 1, BATCH)]
    for batch in batches[:: max(1, len(batches) // 50)]:  # checksums are compared once
        reader.read(0, batch, [str(i) for i in batch], [captions[i] for i in batch], [])
    ids = [[str(index) for index in batch] for batch in batches]
    texts = [[captions[index] for index in batch] for batch in batches]
    start = time.process_time()
    for batch, names, words in zip(batches, ids, texts, strict=True):
        all(reader.has(0, index) for index in batch)
        reader.read(0, batch, names, words, [])
    return len(batches) * BATCH / (time.process_time() - start)


if __name__ == "__main__":
    main()

"""How a cached CMAPKD step and its cache grow: time and memory against samples, levels, batch and embedding width.

    uv run --group bench python benchmarks/scaling.py --json docs/results/scaling.json --png docs/images/scaling.png

Models are `tiny`, fed with noise; the cache is of kind `pooled` in fp16. Each point is measured in a process of its own
that has only imported before, on one thread, by that process's own time. Memory is what its peak rose by. `--plot`
draws an earlier result again.
"""

from __future__ import annotations

import argparse
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

from cmapkd.cache import CacheReader
from cmapkd.cache.files import write_json
from cmapkd.cache.folder import CacheFolder
from cmapkd.cache.identity import row_check
from cmapkd.cache.layout import RowLayout
from cmapkd.cache.rows import CHECK
from cmapkd.cache.teacher import CachedTeacher
from cmapkd.data.types import Batch, ModelInput
from cmapkd.methods import METHODS, build_method
from cmapkd.models import FrozenTeacher, ModelConfig, build_model
from cmapkd.provenance import describe_environment

LEVELS = ("P5", "L4", "L3", "P4", "P3", "P2", "L2", "L1")  # in the order in which they are added
BASE = {"samples": 8192, "levels": 8, "batch": 128, "width": 256}
AXES: dict[str, list[int]] = {
    "samples": [1024, 8192, 65536, 262144],
    "levels": [2, 3, 5, 8],
    "batch": [32, 64, 128, 256, 512],
    "width": [64, 256, 768, 1536],
}
UNITS = {"samples": "samples in the cache", "levels": "levels", "batch": "batch", "width": "embedding width"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--png", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--plot", action="store_true", help="only draw what --json holds")
    arguments = parser.parse_args()
    if not arguments.plot:
        torch.set_num_threads(1)
        points: dict[str, list[dict[str, Any]]] = {axis: [] for axis in AXES}
        for axis, values in AXES.items():
            for value in values:
                points[axis].append({axis: value, **in_fork({**BASE, axis: value}, arguments.steps)})
                print(axis, points[axis][-1], flush=True)
        result = {"base": BASE, "points": points, "environment": describe_environment()}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.png:
        plot(json.loads(arguments.json.read_text()), arguments.png)


def in_fork(sizes: dict[str, int], steps: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            try:
                Path(file.name).write_text(json.dumps(measure(**sizes, steps=steps)))
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"{sizes}: ended with status {status}")
        result: dict[str, Any] = json.loads(Path(file.name).read_text())
        return result


def measure(samples: int, levels: int, batch: int, width: int, steps: int) -> dict[str, Any]:
    before = peak()
    torch.manual_seed(0)
    captions = ["a red square", "a green circle above a blue star"] * (batch // 2)
    teacher = FrozenTeacher(build_model(named("tiny:large", width), captions=captions))
    student = build_model(named("tiny:base", width), captions=captions)
    chosen = LEVELS[:levels]
    settings = {
        "name": "cmapkd",
        "places": "pooled",
        "bank": {"sample": 1024},
        "visual_levels": {level: 0.1 for level in chosen if level[0] == "P"},
        "language_levels": {level: 0.1 for level in chosen if level[0] == "L"},
    }
    method = build_method(METHODS["cmapkd"].Config.from_mapping(settings), student=student, teacher=teacher)
    inputs = ModelInput(
        torch.randn(batch, 3, student.image_spec.size, student.image_spec.size), student.tokenizer(captions)
    )
    with tempfile.TemporaryDirectory() as folder:
        cache = stored(Path(folder), method, inputs, samples)
        reader = CacheReader(cache, check="sizes")
        method.teacher = CachedTeacher(teacher.model, cache, reload=lambda: student)
        method.train()
        optimizer = torch.optim.AdamW([each for each in method.parameters() if each.requires_grad], fused=True)
        draws = np.random.default_rng(0)
        reading, step = [], []
        for _ in range(1 + steps):
            indices = draws.choice(samples, batch, replace=samples < batch)
            start = time.process_time()
            rows = reader.read(0, indices.tolist(), ["s"] * batch, ["c"] * batch, [])
            reading.append(time.process_time() - start)
            ready = Batch(tuple(map(str, indices)), {"student": inputs}, ("c",) * batch, stored={"teacher": rows})
            terms = method(ready)
            torch.stack([term.weight * term.value for term in terms.values()]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            step.append(time.process_time() - start)
    return {
        "step_ms": round(1000 * statistics.median(step[1:]), 2),
        "read_ms": round(1000 * statistics.median(reading[1:]), 3),
        "bytes_per_row": cache.layout.row_bytes,
        "cache_mib": round(samples * cache.layout.row_bytes / 2**20, 1),
        "peak_mib": round((peak() - before) / 2**20),
    }


def named(name: str, width: int) -> ModelConfig:
    return ModelConfig(name=name, options={"embed_dim": width})


def stored(folder: Path, method: Any, inputs: ModelInput, samples: int) -> CacheFolder:
    """Rows of noise in the layout that the method reads."""
    with torch.no_grad():
        answers = method.teacher.model(inputs, method.teacher_needs)
    layout = RowLayout.of(answers, kind=method.teacher_detail, store="fp16", context_length=1)
    about = {"identity": {}, "about": {}, "logit_scale": 20.0, "logit_bias": None}
    cache = CacheFolder.create(folder / "c", layout=layout, length=samples, **about)
    cache.add_part(np.arange(samples, dtype=np.int64), number=0, batch_size=128, shard_bytes=64 * 2**20)
    part = cache.parts()[0]
    row = np.zeros(1, layout.dtype)
    for name in layout.dtype.names or ():
        if name != CHECK:
            row[name] = np.random.default_rng(0).standard_normal(row[name].shape)
    row[CHECK] = row_check("s", 0, "c")
    for shard in range(part.num_shards):
        first, last = part.extent(shard)
        with part.data(shard).open("wb") as file:
            block = np.repeat(row, 1024).tobytes()
            whole, rest = divmod(last - first, 1024)
            for _ in range(whole):
                file.write(block)
            file.write(block[: rest * layout.row_bytes])
        write_json(part.record(shard), {"rows": last - first, "bad": 0, "checksum": "", "fidelity": {}})
    return cache


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    figure, axes = plt.subplots(2, len(AXES), figsize=(13, 5.4), sharex="col", sharey="row", layout="constrained")
    for column, (axis, rows) in enumerate(result["points"].items()):
        values = [row[axis] for row in rows]
        upper, lower = axes[0, column], axes[1, column]
        upper.plot(values, [row["step_ms"] for row in rows], "o-", color="#1f5a93", label="step")
        upper.plot(values, [row["read_ms"] for row in rows], "s--", color="#c2571a", label="reading rows, in it")
        lower.plot(values, [row["peak_mib"] for row in rows], "o-", color="#1f5a93", label="process")
        lower.plot(values, [row["cache_mib"] for row in rows], "s--", color="#c2571a", label="cache on disk")
        for each in (upper, lower):
            if axis != "levels":
                each.set_xscale("log", base=2)
            each.set_xticks(values, [f"{value // 1024}k" if value > 4096 else str(value) for value in values])
            each.grid(alpha=0.3)
            each.spines[["top", "right"]].set_visible(False)
            each.set_yscale("log")
            each.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            each.minorticks_off()
        lower.set_xlabel(UNITS[axis])
    axes[0, 0].set_ylabel("CPU ms a step")
    axes[1, 0].set_ylabel("MiB")
    axes[0, 0].legend(frameon=False)
    axes[1, 0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

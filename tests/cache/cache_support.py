"""Small caches of small teachers, made in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cmapkd.cache import CachedTeacher, CachePlan, CacheReader, all_keys
from cmapkd.cache.config import CacheConfig
from cmapkd.cache.folder import CacheFolder
from cmapkd.data.views import ViewSpec
from cmapkd.methods import Method
from helpers import MemorySource, make_method, make_trainer, read_lines

VIEWS = ViewSpec(crop_scale=(0.6, 1.0), flip=0.5, num_views=2)
LENGTH = 24
SMALL_SHARDS = 0.0005  # MiB: a batch or a few


def cache_plan(folder: Path | None, method: Method | None = None, **changes: Any) -> CachePlan:
    """For every sample of a `MemorySource` in both views; settings of the plan, or of its config."""
    method = method or make_method("clip_kd")
    source = changes.pop("source", None) or MemorySource(LENGTH)
    views = changes.pop("views", VIEWS)
    keys = changes.pop("keys", None)
    keys = all_keys(len(source), views.num_views or 1) if keys is None else keys
    precision = changes.pop("precision", "fp32")
    config = CacheConfig(**{"folder": folder, "batch_size": 4, "shard_mib": SMALL_SHARDS, "store": "fp32", **changes})
    return CachePlan.of_method(config, method, source=source, views=views, keys=keys, precision=precision)


def built(folder: Path, method: Method | None = None, **changes: Any) -> CacheFolder:
    plan = cache_plan(folder, method, **changes)
    plan.build(device="cpu")
    return CacheFolder.open(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(out: Path) -> list[dict[str, float]]:
    """What a run logged, without what is measured of the machine."""
    lines = read_lines(out / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "pairs_per_second"} for line in lines]


def train(
    out: Path,
    name: str,
    settings: dict[str, Any] | None = None,
    *,
    cache: dict[str, Any] | None = None,
    source: Any = None,
    reload: Any = None,
    steps: int = 7,
    **options: Any,
) -> tuple[list[dict[str, float]], Method]:
    """A run with the live teacher, or with one cached in these settings; the same in all else."""
    method = make_method(name, settings=settings)
    source = source or MemorySource(LENGTH)
    builder: dict[str, Any] = {"views": VIEWS}
    if cache is not None:
        precision = options.get("precision", "fp32")
        plan = cache_plan(
            cache.pop("folder", out.with_name(f"{out.name}-cache")), method, source=source, precision=precision, **cache
        )
        plan.build(device="cpu")
        reader = plan.open()
        builder["stored"] = {"teacher": reader}
        method.teacher = plan.cached_teacher(reader, reload or _never)
    torch.manual_seed(1)
    trainer = make_trainer(out, method, source=source, steps=steps, builder=builder, **options)
    trainer.run()
    return losses(out), method


def _never() -> Any:
    raise AssertionError("the live teacher was asked for")


__all__ = [
    "LENGTH",
    "VIEWS",
    "CacheReader",
    "CachedTeacher",
    "built",
    "cache_plan",
    "contents",
    "losses",
    "train",
]

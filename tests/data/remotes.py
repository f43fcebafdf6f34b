"""Shards as remote ones are tested with, and batches of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import picture, write_tar

from cmapkd.data import shard_files, stores
from cmapkd.data.loading import make_loader
from cmapkd.data.ordering import Ordering
from cmapkd.data.plans import PlanSampler
from cmapkd.data.types import Batch
from helpers import make_builder, make_method

SHARDS, IN_SHARD, BATCH = 16, 6, 8


def write_shards(place: Path) -> None:
    """Shards of about 20 kB, one of whose samples is damaged."""
    for shard in range(SHARDS):
        members = []
        for number in range(IN_SHARD):
            bad = (shard, number) == (5, 2)
            members.append((f"{number:03}.png", b"damaged" if bad else picture(8 * shard + number)))
            members.append((f"{number:03}.txt", f"picture {number} of {shard}".encode()))
        members.append(("005.bin", bytes(np.random.default_rng(shard).integers(0, 256, 9000 + 50 * shard, np.uint8))))
        write_tar(place / f"{shard:03}.tar", members)


def be_impatient(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A cache of its own for a test, and little patience."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    monkeypatch.setattr(stores, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(stores, "RANGE", 16384)  # two ranges a shard
    monkeypatch.setattr(shard_files, "TOUCHED_EVERY", 0.0)


def read(
    source: Any, *, kind: Any = "window", lanes: int = 4, workers: int = 0, stop: int = 12, **options: Any
) -> list[Batch]:
    """Steps of one epoch of 12, as a run reads them: 4 lanes, windows of 2 shards."""
    streams = Ordering(kind, lanes, 2).streams(source, length=len(source), batch_size=BATCH, seed=1)
    plans = PlanSampler(len(source), batch_size=BATCH, seed=1, **{"start": 0, **options}, stop=stop, streams=streams)
    built = make_builder(make_method("contrastive"), source, streams=streams, memory=0)
    return list(make_loader(built, plans, workers=workers, pin_memory=False))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert [batch.ids for batch in one] == [batch.ids for batch in other]
    assert [batch.bad for batch in one] == [batch.bad for batch in other]
    assert [batch.captions for batch in one] == [batch.captions for batch in other]
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.inputs["student"].images, b.inputs["student"].images)

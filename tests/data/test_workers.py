"""How far workers read ahead, where they begin again, and what reaches one that does not fork."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Iterator
from itertools import count
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from making import picture, write_tar

from cmapkd.config import ConfigError
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.labels import LabelReader
from cmapkd.data.loading import make_loader
from cmapkd.data.open import open_source
from cmapkd.data.plans import Plan, PlanSampler
from cmapkd.data.readers import DualReader
from cmapkd.data.streams import JoinedSource
from cmapkd.data.types import TokenBatch
from cmapkd.data.views import ViewSpec
from cmapkd.data.workers import AHEAD_BYTES, MOST_AHEAD, RemainingPlaces, WorkerWarning, made_ahead
from helpers import MemorySource, make_builder, make_method, make_teacher, second_teacher

GIB = 2**30
ROWS = 2000


# ------------------------------------------------------------------------------------------------ beginning again


def test_places_that_can_begin_anywhere_are_not_counted_up_to_there() -> None:
    made: list[int] = []

    class Counting(PlanSampler):
        def plan(self, step: int) -> Plan:
            made.append(step)
            return super().plan(step)

    sampler = Counting(1000, batch_size=4, seed=0, start=10, stop=200)
    (plan, *_) = [*RemainingPlaces(sampler, 187)]
    assert plan.step == 197
    assert made == [197, 198, 199]
    assert [*RemainingPlaces([1, 2, 3], 2)] == [3]
    assert [*RemainingPlaces((number for number in range(5)), 3)] == [3, 4]
    assert next(iter(RemainingPlaces(range(10**12), 10**11))) == 10**11
    assert next(iter(RemainingPlaces(count(), 3))) == 3


# ------------------------------------------------------------------------------------------------ how far ahead


def test_no_more_is_made_ahead_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [64 * GIB]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    assert made_ahead(0, 10 * GIB) == (0, MOST_AHEAD)
    assert made_ahead(8, 0) == (8, MOST_AHEAD)
    assert made_ahead(8, GIB // 8) == (8, 4)
    assert made_ahead(8, GIB // 2) == (8, 2)
    for size in (1, GIB // 100, GIB // 7, GIB, 3 * GIB):
        workers, ahead = made_ahead(2, size)
        assert workers * ahead * size <= AHEAD_BYTES
        assert 1 <= ahead <= MOST_AHEAD
    with pytest.warns(
        WorkerWarning, match="2.50 GiB and there is room for 8.00 GiB .* 3 of 8 data workers are started"
    ):
        assert made_ahead(8, 5 * GIB // 2) == (3, 1)
    free[0] = 64 * 2**20  # a container's /dev/shm
    with pytest.warns(WorkerWarning, match="1 of 2 data workers"):
        assert made_ahead(2, GIB) == (1, 1)


def test_a_builder_knows_the_size_of_its_batches() -> None:
    specs = {"local": ViewSpec(crop_scale=(0.1, 0.3))}
    method = make_method("hinton")
    for more in ({}, {"more_views": {"local": 3}, "view_specs": specs}):
        builder = make_builder(method, **more)
        batch = builder[Plan(0, 0, (1, 2, 4), (1, 2, 4))]
        views = [each for inputs in batch.inputs.values() for each in (inputs.images, *inputs.more_images.values())]
        assert builder.bytes_of(3) == sum(each.nbytes for each in views)
    alike = make_builder(make_method("hinton", teacher=make_teacher(image_size=16)))
    assert alike.bytes_of(1) == 3 * 16 * 16  # shared


# ------------------------------------------------------------------------------------------------ shared between models


def test_texts_are_tokenised_once_for_models_of_one_tokenizer() -> None:
    calls: list[int] = []
    method = make_method("mobileclip", settings={"synthetic": True}, more_teachers=[second_teacher()])
    own = method.student.tokenizer

    class Equal:
        """Two of these are one tokenizer, as those of a model family that say so."""

        def __call__(self, texts: Any) -> TokenBatch:
            calls.append(len(texts))
            return own(texts)

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        def __hash__(self) -> int:
            return 0

    models = {"student": method.student} | {role: teacher.model for role, teacher in method.teachers.items()}
    readers = {role: DualReader(model.image_spec, Equal()) for role, model in models.items()}
    builder = BatchBuilder(MemorySource(), ViewSpec(), readers, seed=0)
    batch = builder[Plan(0, 0, (1, 2), (1, 2))]
    assert calls == [2]
    assert batch.inputs["student"].texts is batch.inputs["second"].texts
    moved = batch.to("meta")
    assert moved.inputs["student"].texts.ids is moved.inputs["teacher"].texts.ids  # and is moved once
    assert moved.inputs["student"].images is not moved.inputs["teacher"].images


def test_what_models_share_is_moved_once() -> None:
    batch = make_builder(make_method("hinton", teacher=make_teacher(image_size=16)))[Plan(0, 0, (1, 2), (1, 2))]
    moved = batch.to("meta")
    assert moved.inputs["student"].images is moved.inputs["teacher"].images
    kept = batch.to("meta", images=False)
    assert kept.inputs["student"].images is batch.inputs["student"].images


# ------------------------------------------------------------------------------------------------ found in the worker


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_without_a_class_is_found_where_it_is_read(workers: int) -> None:
    assert LabelReader(num_classes=5).join([4, -1]).tolist() == [4, -1]
    builder = make_builder(make_method("contrastive"), extras={"labels": LabelReader(num_classes=4)})
    sampler = PlanSampler(24, batch_size=8, seed=0, start=0, stop=3)
    with pytest.raises(ConfigError, match=r"^sample 'm\d+' has label 4, but there are only 4 classes"):
        list(make_loader(builder, sampler, workers=workers, pin_memory=False))


# ------------------------------------------------------------------------------------------------ without a fork


def write_kinds(folder: Path) -> list[str]:
    """A folder, a tar, a table and a parquet file, each with `ROWS` samples of one picture."""
    import pyarrow
    from pyarrow import parquet

    image = picture()
    long = "with a name that is long enough to be seen in what is sent"
    (images := folder / "images").mkdir()
    for number in range(ROWS):
        (images / f"{number:05d} {long}.png").write_bytes(image)
        (images / f"{number:05d} {long}.txt").write_text(f"caption {number}")
    members = [(f"{n:05d} {long}.{kind}", data) for n in range(ROWS) for kind, data in (("png", image), ("txt", b"a"))]
    write_tar(folder / "t.tar", members)
    rows = [{"id": f"{n} {long}", "image": f"images/{n:05d} {long}.png", "caption": f"c {n}"} for n in range(ROWS)]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = {"image": [{"bytes": image, "path": None}] * ROWS, "caption": [f"c {n} {long}" for n in range(ROWS)]}
    parquet.write_table(pyarrow.table(table), folder / "t.parquet")
    return [
        f"folder:{images}",
        f"webdataset:{folder / 't.tar'}",
        f"jsonl:{folder / 't.jsonl'}",
        f"parquet:{folder / 't.parquet'}",
    ]


@pytest.fixture
def forkserver() -> Iterator[None]:
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_that_do_not_fork_get_sources_as_shared_memory(
    tmp_path: Path, forkserver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default of Linux since Python 3.14: then everything that a worker needs is sent to it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "index"))
    sources = {}
    for number, spec in enumerate(write_kinds(tmp_path)):
        sources["train" if not number else f"s{number}"] = source = open_source(spec, require_captions=True)
        assert len(source) == ROWS
        sent = len(ForkingPickler.dumps(source))
        assert sent < 20_000, f"{spec}: {sent} bytes"
    joined = JoinedSource(sources, dict.fromkeys(["s1", "s2", "s3"], 0.25))
    builder = make_builder(make_method("contrastive"), joined)
    sampler = PlanSampler(len(joined), batch_size=8, seed=0, start=0, stop=3, streams=joined.streams)
    alone, helped = (list(make_loader(builder, sampler, workers=workers, pin_memory=False)) for workers in (0, 1))
    for one, other in zip(alone, helped, strict=True):
        assert one.ids == other.ids
        assert one.captions == other.captions
        assert not one.bad
        assert torch.equal(one.inputs["student"].images, other.inputs["student"].images)

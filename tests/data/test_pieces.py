"""Batches in pieces: the same bits however they are cut and whoever makes them, within a budget of shared memory."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cmapkd.config import ConfigError
from cmapkd.data.batches import BatchBuilder, Extra
from cmapkd.data.held_out import WithHeldOut
from cmapkd.data.labels import LabelReader
from cmapkd.data.loading import make_loader
from cmapkd.data.pictures import PictureReader
from cmapkd.data.pieces import InPieces, Part, Pieces, bytes_of_rows, rows_of_piece
from cmapkd.data.plans import Plan, PlanSampler
from cmapkd.data.ring import Landing, joined
from cmapkd.data.streams import JoinedSource
from cmapkd.data.tokens import TokenBatch, united_texts
from cmapkd.data.types import Batch, ModelInput, Sample, StoredRows
from cmapkd.data.unseen import NO_PICTURE
from cmapkd.data.views import ViewSpec
from cmapkd.data.workers import slot_bytes
from helpers import MemorySource, digest, make_builder, make_method, make_teacher, second_teacher

pytestmark = pytest.mark.usefixtures("one_thread")
MIB = 2**20


def cut(builder: InPieces, plan: Plan, size: int) -> list[Part]:
    """The pieces of a batch, without what they share, as workers hand them over."""
    bounds = range(0, len(plan.mine), size)
    return [builder.piece(plan, first, min(first + size, len(plan.mine))) for first in bounds]


class Answered:
    """A cache that has the answers to the samples that `index % 5` is above 1 for."""

    needs_texts = True
    row_bytes = 12

    def has(self, view: int, index: int) -> bool:
        return index % 5 > 1

    def read(self, view: Any, indices: Any, ids: Any, captions: Any, missing: Sequence[int]) -> StoredRows:
        rows = torch.tensor(
            [[float(index), float(len(text)), 1.0] for index, text in zip(indices, captions, strict=True)]
        )
        rows[[*missing]] = 0
        return StoredRows({"image": rows}, torch.tensor([*missing], dtype=torch.int64), torch.tensor([*indices]))


class WithoutTexts(Answered):
    needs_texts = False


def rich(kind: type[Answered] | None = None, **options: Any) -> BatchBuilder:
    """Three models, two of one size, texts of a pool, further views, extras, streams and bad samples."""
    method = make_method("mobileclip", settings={"synthetic": True}, more_teachers=[second_teacher()])
    main = MemorySource(40, bad=range(0, 40, 3), without_caption=(4,), without_synthetic=(7,))
    source = JoinedSource({"train": main, "more": MemorySource(30, bad=(1, 2))}, {"more": 0.4})
    options = {
        "extras": {"picture": PictureReader()},
        "more_views": {"local": 2},
        "view_specs": {"local": ViewSpec(crop_scale=(0.2, 0.5))},
        **options,
    }
    stored = {} if kind is None else {"stored": {"second": kind()}}
    return make_builder(method, source, **stored, **options)


def plans(builder: BatchBuilder, steps: int = 4, size: int = 12, **options: Any) -> PlanSampler:
    streams = getattr(builder.source, "streams", ())
    return PlanSampler(len(builder.source), batch_size=size, seed=3, start=0, stop=steps, streams=streams, **options)


# ------------------------------------------------------------------------------------------------ cuts


@pytest.mark.parametrize("kind", [None, Answered, WithoutTexts])
def test_a_batch_does_not_depend_on_its_cuts(kind: type[Answered] | None) -> None:
    builder = rich(kind)
    bad = 0
    for plan in plans(builder):
        whole = builder[plan]
        bad += len(whole.bad)
        assert len(set(whole.ids)) == 12
        for size in (1, 3, 5, 11):
            batch = builder.join(plan, cut(builder, plan, size))
            assert digest(batch) == digest(whole)
            student, second = batch.inputs["student"], batch.inputs["second"]
            assert student.texts is second.texts
            teacher = batch.inputs["teacher"]
            assert student.images is not teacher.images
    assert bad > 6


def test_what_models_share_stays_one_object() -> None:
    builder = make_builder(make_method("hinton", teacher=make_teacher(image_size=16)))
    plan = Plan(0, 0, (1, 2, 4, 5), (1, 2, 4, 5))
    batch = builder.join(plan, cut(builder, plan, 3))
    assert batch.inputs["student"].images is batch.inputs["teacher"].images
    assert batch.inputs["student"].texts is batch.inputs["teacher"].texts


def test_pieces_that_would_replace_by_the_same_sample_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = make_builder(make_method("contrastive"), MemorySource(30, bad=range(0, 30, 2)))
    again: Counter[int] = Counter()
    made = BatchBuilder.piece

    def counted(self: BatchBuilder, plan: Plan, first: int, last: int, taken: Any = ()) -> Part:
        again[plan.step] += bool(taken)
        return made(self, plan, first, last, taken)

    monkeypatch.setattr(BatchBuilder, "piece", counted)
    for plan in plans(builder, steps=20):
        batch = builder.join(plan, cut(builder, plan, 2))
        assert digest(batch) == digest(builder[plan])
        assert len(set(batch.ids)) == 12
    assert sum(again.values()) > 5  # or this test shows nothing


def test_texts_of_other_lengths_are_padded_with_their_own_token() -> None:
    def texts(length: int, rows: int) -> TokenBatch:
        ids = torch.arange(1, rows * length + 1).view(rows, length)
        return TokenBatch(ids, torch.ones_like(ids).bool(), ids[..., None].expand(-1, -1, 2), pad_id=99).measured()

    whole = united_texts([texts(3, 2), texts(5, 1)])
    assert whole.ids.tolist() == [[1, 2, 3, 99, 99], [4, 5, 6, 99, 99], [1, 2, 3, 4, 5]]
    assert whole.mask.sum(1).tolist() == [3, 3, 5]
    assert whole.spans is not None
    assert whole.spans[0].tolist() == [[1, 1], [2, 2], [3, 3], [0, 0], [0, 0]]
    assert whole.lengths is not None
    assert whole.lengths.of_each == (3, 3, 5)
    assert united_texts([replace(texts(3, 2), spans=None), texts(5, 1)]).spans is None


def test_neighbours_in_memory_are_joined_without_a_copy() -> None:
    landing = Landing(3)
    parts = [landing.take(0, 24).view(torch.float32).view(rows, 2, 1).fill_(rows) for rows in (3, 3, 3)]
    whole = joined(parts)
    assert whole.data_ptr() == parts[0].data_ptr()
    assert torch.equal(whole, torch.cat(parts))
    apart = [parts[0], parts[2]]
    assert torch.equal(joined(apart), torch.cat(apart))
    assert joined(apart).data_ptr() != parts[0].data_ptr()
    other = torch.ones(2, 2, 1)
    assert torch.equal(joined([parts[0], other]), torch.cat([parts[0], other]))
    assert joined([parts[0][:2], parts[0][2:].to(torch.float64)]).dtype == torch.float64


# ------------------------------------------------------------------------------------------------ order and resume


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_deliver_the_bits_that_one_process_makes(workers: int) -> None:
    builder = rich(Answered)
    alone, helped = (
        [digest(batch) for batch in make_loader(builder, plans(builder), workers=number, pin_memory=False)]
        for number in (0, workers)
    )
    assert alone == helped
    resumed = plans(builder)
    resumed.start = 3
    assert [digest(batch) for batch in make_loader(builder, resumed, workers=workers, pin_memory=False)] == alone[3:]


def test_two_processes_deliver_the_halves_of_one() -> None:
    builder = make_builder(make_method("contrastive"), MemorySource(300, bad=(5, 9)))
    whole = [*make_loader(builder, plans(builder), workers=2, pin_memory=False)]
    halves = [
        [*make_loader(builder, plans(builder, rank=rank, world_size=2), workers=2, pin_memory=False)] for rank in (0, 1)
    ]
    for batch, one, other in zip(whole, *halves, strict=True):
        assert batch.ids == one.ids + other.ids
        images = [each.inputs["student"].images for each in (one, other)]
        assert torch.equal(batch.inputs["student"].images, torch.cat(images))


def test_held_out_pairs_come_with_the_first_piece() -> None:
    def of() -> WithHeldOut:
        main, beside = (make_builder(make_method("contrastive"), each) for each in (MemorySource(24), Renamed()))
        return WithHeldOut(main, beside, every=2, batch_size=4, seed=1)

    sampler = PlanSampler(24, batch_size=8, seed=3, start=0, stop=5)
    alone, helped = ([*make_loader(of(), sampler, workers=workers, pin_memory=False)] for workers in (0, 2))
    assert [batch.held_out is not None for batch in helped] == [True, False, True, False, True]
    assert [*map(digest, alone)] == [*map(digest, helped)]


class Renamed(MemorySource):
    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(index).renamed(f"other{index}")


def test_pieces_can_begin_anywhere() -> None:
    sampler = PlanSampler(100, batch_size=10, seed=0, start=3, stop=7)
    pieces = Pieces(sampler, 4)
    assert pieces.each == 3
    every = [*pieces]
    assert [(piece.plan.step, piece.first, piece.last) for piece in every[:4]] == [
        (3, 0, 4),
        (3, 4, 8),
        (3, 8, 10),
        (4, 0, 4),
    ]
    for start in range(13):
        assert [*pieces.skip(start)] == every[start:]
    assert every[1].name() == f"the batch of step 4, samples {', '.join(map(str, every[1].plan.mine[4:8]))}"


# ------------------------------------------------------------------------------------------------ who makes them


class Noting(MemorySource):
    """Notes who reads which sample."""

    def __init__(self, folder: Path) -> None:
        super().__init__(64)
        self.folder = folder

    def __getitem__(self, index: int) -> Sample:
        time.sleep(0.01)  # so that one core gives others their turn
        (self.folder / f"{os.getpid()}-{index}").touch()
        return super().__getitem__(index)


def test_all_workers_make_the_first_batch_together(tmp_path: Path) -> None:
    """Each of four reads a quarter of it: with a core each the first batch comes in a quarter of the time."""
    builder = make_builder(make_method("contrastive"), Noting(tmp_path))
    sampler = PlanSampler(64, batch_size=32, seed=0, start=0, stop=1)
    (batch,) = make_loader(builder, sampler, workers=4, pin_memory=False)
    readers = Counter(path.name.partition("-")[0] for path in tmp_path.iterdir())
    assert len(batch) == 32
    assert [*readers.values()] == [8] * 4


# ------------------------------------------------------------------------------------------------ the budget


class Wide:
    """Batches of bytes that cost nothing to make, as large as real ones. Looks at the shared memory while they wait."""

    source = range(10**6)

    def __init__(self, row: int) -> None:
        self.row, self.most = row, 0

    def bytes_of(self, size: int) -> int:
        return size * self.row

    def __getitem__(self, plan: Plan) -> Batch:
        return self.join(plan, [self.piece(plan, 0, len(plan.mine))])

    def piece(self, plan: Plan, first: int, last: int) -> Part:
        images = torch.zeros(last - first, self.row, dtype=torch.uint8)
        images[:, :8] = torch.tensor(plan.mine[first:last])[:, None].view(torch.uint8)
        texts = TokenBatch(torch.zeros(last - first, 1).long(), torch.ones(last - first, 1).bool())
        return Part((), (), {"student": ModelInput(images, texts)}, {}, {}, ())

    def join(self, plan: Plan, parts: Sequence[Part]) -> Batch:
        used = shutil.disk_usage("/dev/shm")
        self.most = max(self.most, used.used)
        images = joined([part.inputs["student"].images for part in parts])
        assert images.data_ptr() == parts[0].inputs["student"].images.data_ptr()  # copied once
        assert images[:, :8].contiguous().view(torch.int64).flatten().tolist() == [*plan.mine]
        return Batch(tuple(map(str, plan.mine)), {}, ())


@pytest.mark.parametrize("workers", [1, 4])
def test_shared_memory_stays_within_the_budget_at_a_batch_of_32768(workers: int) -> None:
    budget = 16  # MiB, where a batch takes 128
    before = shutil.disk_usage("/dev/shm").used
    builder = Wide(2**12)
    sampler = PlanSampler(10**6, batch_size=2**15, seed=0, start=0, stop=1)
    loader = make_loader(builder, sampler, workers=workers, pin_memory=False, prefetch_mib=budget)  # type: ignore[arg-type]
    for _ in loader:
        pass
    assert budget * MIB // 4 < builder.most - before <= budget * MIB
    assert shutil.disk_usage("/dev/shm").used <= before + MIB  # nothing is left


@pytest.mark.parametrize("size", [1, 7, 64, 4096, 32768])
@pytest.mark.parametrize("workers", [1, 2, 8, 64])
@pytest.mark.parametrize("mib", [16, 256, 2048])
def test_pieces_fit_twice_for_each_worker(size: int, workers: int, mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    pixels = 3 * 224 * 224
    rows = rows_of_piece(size, workers=workers, pixels=pixels, mib=mib)
    assert 1 <= rows <= min(256, -(-size // workers))
    assert rows == 1 or 2 * workers * slot_bytes(bytes_of_rows(rows, pixels)) <= mib * MIB


def test_without_room_for_one_sample_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * MIB))
    assert rows_of_piece(256, workers=8, pixels=3 * 224 * 224, mib=2048) == 8  # in the 64 MiB that a container has
    with pytest.raises(ConfigError, match=r"takes 8\.\d+ MiB .* data.prefetch_mib is 4, and /dev/shm has 64"):
        rows_of_piece(256, workers=8, pixels=8 * MIB, mib=4)
    with pytest.raises(ConfigError, match=r"takes 41.* data.prefetch_mib is 2048, and .* set data.workers=0"):
        rows_of_piece(256, workers=8, pixels=40 * MIB, mib=2048)


def test_the_bytes_of_stored_answers_count() -> None:
    builder = make_builder(make_method("clip_kd"), stored={"teacher": Answered()})
    assert builder.bytes_of(5) == 5 * (3 * 16 * 16 + 12)


class Told(MemorySource):
    """Ids and texts can be had without the picture; notes which pictures were read."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.read: list[int] = []

    def id(self, index: int) -> str:
        return f"m{index}"

    def unseen(self, index: int) -> Sample:
        return replace(super().__getitem__(index), image=NO_PICTURE)

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        return super().__getitem__(index)


class EveryAnswer(Answered):
    def has(self, view: int, index: int) -> bool:
        return True


class SizeReader(PictureReader):
    of_sample = False  # as one of a view's crop would be


@pytest.mark.parametrize("extra", [None, PictureReader(), LabelReader(), SizeReader()])
def test_pictures_whose_answers_are_stored_are_read_once_for_what_extras_make_of_them(extra: Extra | None) -> None:
    source = Told(8)
    extras = {} if extra is None else {"extra": extra}
    builder = make_builder(make_method("contrastive"), source, stored={"student": EveryAnswer()}, extras=extras)
    first, second = (builder[Plan(step, step, (0, 1, 2), (0, 1, 2))] for step in range(2))
    whole = make_builder(make_method("contrastive"), MemorySource(8), extras=extras)[Plan(1, 1, (0, 1, 2), (0, 1, 2))]
    assert first.ids == second.ids == whole.ids
    assert second.captions == whole.captions
    assert all(torch.equal(second.extra[name], whole.extra[name]) for name in extras)
    assert source.read == {None: [], SizeReader: [0, 1, 2, 0, 1, 2]}.get(extra and type(extra), [0, 1, 2])

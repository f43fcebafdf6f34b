"""Windows of shards: each sample once, mixed almost as by a full shuffle, the same for every number of processes."""

from __future__ import annotations

import time
import tracemalloc
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
from making import picture, write_tar
from numpy.typing import NDArray

from cmapkd.cache import keys_of_run
from cmapkd.config import ConfigError
from cmapkd.data.loading import make_loader
from cmapkd.data.open import open_source
from cmapkd.data.ordering import Ordering, describe
from cmapkd.data.parts import PartOfSource
from cmapkd.data.plans import PlanSampler
from cmapkd.data.random import key_of, permuted, permuted_each, unpermuted
from cmapkd.data.streams import JoinedSource, Stream
from cmapkd.data.types import BadSampleError
from cmapkd.data.views import WHOLE, ViewSpec
from cmapkd.data.window_order import WindowOrder, shard_counts
from helpers import MemorySource, Sharded, make_builder, make_method

UNEVEN = (13, 0, 40, 7, 25, 31, 1, 60, 18, 22, 9, 44)  # 270 samples


def order(counts: Any = UNEVEN, *, batch: int = 8, lanes: int = 4, window: int = 2, seed: int = 3) -> WindowOrder:
    return WindowOrder(counts, lanes=lanes, rows=batch // lanes, window=window, seed=seed)


def sampler(source: Any, *, batch_size: int = 8, **options: Any) -> PlanSampler:
    ordering = Ordering("window", options.pop("lanes", 4), options.pop("window", 2))
    seed = options.setdefault("seed", 3)
    streams = ordering.streams(source, length=len(source), batch_size=batch_size, seed=seed)
    return PlanSampler(len(source), batch_size=batch_size, streams=streams, **{"start": 0, "stop": 70, **options})


def epochs_of(plans: PlanSampler) -> dict[int, list[int]]:
    shown: dict[int, list[int]] = {}
    for plan in plans:
        shown.setdefault(plan.epoch, []).extend(plan.everyone)
    return shown


# ------------------------------------------------------------------------------------------------ permutations


@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 65, 1000])
def test_a_permutation_can_be_gone_back(length: int) -> None:
    places = np.arange(length)
    assert (unpermuted(permuted(places, length, "order", 7), length, "order", 7) == places).all()


def test_many_permutations_at_once_are_those_of_each() -> None:
    lengths = np.array([100, 4097, 7, 100, 64, 1])
    counts = [100, 50, 7, 10, 64, 1]
    which = np.repeat(np.arange(6), counts)
    positions = np.concatenate([np.arange(count) for count in counts])
    found = permuted_each(positions, which, lengths, [key_of("w", number) for number in range(6)])
    for number, length in enumerate(lengths.tolist()):
        here = which == number
        assert (found[here] == permuted(positions[here], length, "w", number)).all()


# ------------------------------------------------------------------------------------------------ each sample once


@pytest.mark.parametrize(("lanes", "window"), [(1, 1), (1, 3), (2, 2), (4, 2), (8, 1), (8, 40)])
def test_an_epoch_shows_every_sample_at_most_once(lanes: int, window: int) -> None:
    shown = epochs_of(sampler(Sharded(UNEVEN), lanes=lanes, window=window))
    assert [*shown] == [0, 1, 2]
    for epoch in (0, 1):
        assert len(shown[epoch]) == len(set(shown[epoch])) == 264  # 33 batches of 8; 6 wait for another epoch
        assert 0 <= min(shown[epoch]) <= max(shown[epoch]) < 270
    assert shown[0] != shown[1]
    assert len(set(shown[0]) | set(shown[1])) > 264  # others are left out the second time


def test_an_epoch_of_many_shards_shows_every_sample_at_most_once() -> None:
    counts = np.random.default_rng(0).integers(0, 2000, 300)
    made = order(counts, batch=256, lanes=32, window=3)
    for epoch in range(2):
        shown = made.samples(epoch, 0, made.lanes * made.lane // 256 * 256)
        visits = np.bincount(shown, minlength=made.length)
        assert visits.max() == 1
        assert (visits == 0).sum() == made.length % 256


def test_lanes_read_their_own_samples() -> None:
    made = order()
    lanes = [set(made.samples(0, 0, 264).reshape(4, -1)[lane].tolist()) for lane in range(4)]
    assert len(set.union(*lanes)) == sum(map(len, lanes))
    step = made.samples(0, 16, 24).reshape(4, 2)
    assert all(set(step[lane].tolist()) <= lanes[lane] for lane in range(4))


def test_a_batch_straddles_no_two_windows() -> None:
    made = order(np.full(64, 100), batch=64, lanes=8, window=3)
    assert made.size % made.rows == 0
    for first in range(0, made.lane // made.rows * made.rows, made.rows):
        numbers = made._window(np.repeat(np.arange(8), made.rows), np.tile(first + np.arange(made.rows), 8))[0]
        assert (numbers.reshape(8, -1) == numbers.reshape(8, -1)[:, :1]).all()


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_windows_of_a_lane_follow_each_other_and_cover_it(lanes: int) -> None:
    made = order(np.full(64, 100), batch=64, lanes=lanes, window=3)
    for lane in range(lanes):
        places = np.arange(made.lane)
        number, begin, end = made._window(np.full(made.lane, lane), places)
        spans = sorted(set(zip(number.tolist(), begin.tolist(), end.tolist(), strict=True)))
        assert spans[0][1] == 0
        assert spans[-1][2] == made.lane
        assert all(one[2] == other[1] for one, other in pairwise(spans))
        assert all(stop - start <= 1.5 * made.size for _, start, stop in spans)


def test_few_shards_are_read_at_a_time() -> None:
    made = order(np.full(400, 50), batch=32, lanes=4, window=6)
    ends = np.cumsum(made.counts)
    for first in range(0, made.lanes * made.lane // 32 * 32, 32):
        told = made.shards(0, first, first + 32)
        read = np.unique(np.searchsorted(ends, made.samples(0, first, first + 32), "right"))
        assert set(read.tolist()) <= set(told.tolist())
        assert len(told) == len(set(told.tolist())) <= 4 * (1.5 * 6 + 2)
    some = made.shards(0, 0, 3200, slice(1, 3))
    assert set(some.tolist()) < set(made.shards(0, 0, 3200).tolist())


# ------------------------------------------------------------------------------------------------ of the step alone


def test_the_order_is_the_same_in_every_version() -> None:
    """The numbers are what this order gave when it was written: a run that is resumed must go on with it."""
    made = order()
    assert made.samples(0, 0, 8).tolist() == FIRST
    assert made.samples(5, 128, 136).tolist() == LATER
    assert list(made.instead_of(FIRST[0], 0))[:3] == OTHERS


def test_resume_gives_the_plans_of_the_uninterrupted_run() -> None:
    whole = list(sampler(Sharded(UNEVEN)))
    for start in (0, 1, 3, 33, 34, 69):  # within a window, at its end, at the end of an epoch
        assert list(sampler(Sharded(UNEVEN), start=start)) == whole[start:]
    backwards = sampler(Sharded(UNEVEN))
    assert [backwards.plan(step) for step in reversed(range(70))] == whole[::-1]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_processes_share_the_batch_out(world_size: int) -> None:
    parts = [list(sampler(Sharded(UNEVEN), rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, plan in enumerate(sampler(Sharded(UNEVEN))):
        assert tuple(chain.from_iterable(part[step].mine for part in parts)) == plan.everyone == plan.mine


def test_streams_have_windows_of_their_own_and_a_stage_may_read_one() -> None:
    source = JoinedSource({"train": Sharded(UNEVEN), "extra": MemorySource(40), "more": Sharded((9, 9, 30))}, SHARES)
    only = ("extra", "more", None)
    plans = list(sampler(source, batch_size=16, stop=120, only=lambda step: only[(step // 7) % 3]))
    shown: dict[tuple[str, int], list[int]] = {}
    for plan in plans:
        assert len(set(plan.everyone)) == 16
        for index, name, epoch in zip(plan.mine, plan.streams, plan.epochs, strict=True):
            shown.setdefault((name, epoch), []).append(index)
    assert {name for name, _ in shown} == {"train", "extra", "more"}
    assert all(len(set(each)) == len(each) for each in shown.values())
    assert max(map(len, shown.values())) == 80 * 8 // 2 // 2 * 2 or len(shown) > 6  # several epochs were read
    assert [stream.order is None for stream in source_streams(source)] == [False, True, False]


FIRST, LATER, OTHERS = [115, 89, 233, 244, 162, 165, 202, 200], [257, 268, 12, 90, 225, 222, 64, 35], [10, 3, 88]
SHARES = {"extra": 0.25, "more": 0.25}


def source_streams(source: Any) -> tuple[Stream, ...]:
    return Ordering("window", 4, 2).streams(source, length=len(source), batch_size=16, seed=3)


def test_a_cache_foresees_what_is_read() -> None:
    source, views = Sharded(UNEVEN), ViewSpec(num_views=2)
    made = sampler(source)
    read = {views.view_number(plan.epoch) * 270 + index for plan in sampler(source, stop=20) for index in plan.everyone}
    keys = keys_of_run(270, batch_size=8, seed=3, steps=20, views=views, streams=made.streams)
    assert set(keys.listed().tolist()) == read


@pytest.mark.parametrize(("first", "last"), [(0, 8), (0, 268), (120, 128), (200, 264)])
def test_the_shards_of_a_stretch_are_those_of_its_windows(first: int, last: int) -> None:
    for seed in range(20):
        made = order(seed=seed)
        assert np.flatnonzero(made.touched(1, first, last)).tolist() == sorted(made.shards(1, first, last).tolist())


# ------------------------------------------------------------------------------------------------ mixing


def test_samples_are_read_at_any_time_of_an_epoch() -> None:
    """Chi-squared over eighths of the epoch: 7 for each sample, and 8.6 if lanes began where a shard begins."""
    counts, seeds = np.full(48, 20), 300
    found = np.zeros((960, 8))
    for seed in range(seeds):
        shown = order(counts, batch=16, lanes=4, window=2, seed=seed).samples(0, 0, 960)
        np.add.at(found, (shown, np.tile(np.arange(240), 4) // 30), 1)
    chi = ((found - seeds / 8) ** 2 / (seeds / 8)).sum(axis=1)
    assert 6.2 < chi.mean() < 7.8


def test_batches_are_mixed_almost_as_by_a_full_shuffle() -> None:
    """With 256 shards read at a time, pairs of other shards are within 5 % of a full shuffle's."""
    counts, batch = np.full(1024, 512), 1024
    made = WindowOrder(counts, lanes=32, rows=32, window=8, seed=0)
    full, windows = [], []
    for first in range(0, 2**19, 16 * batch):
        places = np.arange(first, first + batch)
        full.append(share_of_one_shard(permuted(places, 2**19, "order", 0, 0) // 512))
        windows.append(share_of_one_shard(made.samples(0, first, first + batch) // 512))
    assert 0.95 < (1 - np.mean(windows)) / (1 - np.mean(full)) < 1.05
    assert np.mean(windows) == pytest.approx(1 / 256, rel=0.2)


def share_of_one_shard(shards: NDArray[np.int64]) -> float:
    """The share of pairs in a batch whose samples are of one shard."""
    counts, size = np.bincount(shards), len(shards)
    return float((counts * (counts - 1)).sum() / (size * (size - 1)))


# ------------------------------------------------------------------------------------------------ replacement


def test_replacements_of_a_step_are_all_others_and_in_their_lane() -> None:
    made = order(np.full(40, 16), batch=16, lanes=4, window=2)
    lanes = made.samples(1, 0, 640).reshape(4, -1)
    for first in (0, 16, 64, 320, 624):
        step = made.samples(1, first, first + 16)
        taken = [list(made.instead_of(sample, 1)) for sample in step.tolist()]
        assert all(len(each) == len(set(each)) == lanes.shape[1] // 4 - 1 for each in taken)
        together = [*step.tolist(), *chain.from_iterable(taken)]
        assert len(together) == len(set(together))  # no two samples of a step could have the same one
        for row, others in enumerate(taken):
            assert set(others) <= set(lanes[row // 4].tolist())


def test_replacements_come_from_the_same_window_first() -> None:
    made = order(np.full(40, 16), batch=16, lanes=4, window=2)
    ends = np.cumsum(made.counts)
    first = 320
    step = made.samples(1, first, first + 16)
    for row, sample in enumerate(step.tolist()):
        held = made.shards(1, first, first + 16, slice(row // 4, row // 4 + 1))
        _, begin, end = made._window(np.array([row // 4]), np.array([first // 4]))
        near = list(made.instead_of(sample, 1))[: int(end[0] - begin[0]) // 4 - 1]
        assert near
        assert set(np.searchsorted(ends, near, "right").tolist()) <= set(held.tolist())


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_bad_samples_are_replaced_alike_in_every_number_of_processes(world_size: int) -> None:
    source = Sharded(np.full(30, 12), bad=range(0, 360, 5))
    shares = [sampler(source, batch_size=16, rank=rank, world_size=world_size) for rank in range(world_size)]
    made = make_builder(make_method("contrastive"), source, views=WHOLE, streams=shares[0].streams)
    for step in (0, 7, 21, 22, 40):
        parts = [made[share.plan(step)] for share in shares]
        ids = tuple(chain.from_iterable(part.ids for part in parts))
        assert len(set(ids)) == 16
        assert not {f"m{index}" for index in range(0, 360, 5)} & set(ids)
        whole = made[sampler(source, batch_size=16).plan(step)]
        assert whole.ids == ids
        assert whole.bad == tuple(chain.from_iterable(part.bad for part in parts))


def test_data_without_a_readable_sample_stop() -> None:
    source = Sharded(UNEVEN, bad=range(270))
    made = make_builder(make_method("contrastive"), source, streams=sampler(source).streams)
    with pytest.raises(BadSampleError, match="no readable sample was found to take its place at step 7"):
        made[sampler(source).plan(7)]


# ------------------------------------------------------------------------------------------------ settings


def kinds(ordering: Ordering, source: Any, batch_size: int = 8) -> str:
    return describe(ordering.streams(source, length=len(source), batch_size=batch_size, seed=0))


def test_the_order_is_chosen_by_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kinds(Ordering(), MemorySource(270)) == kinds(Ordering(), Sharded(UNEVEN)) == "global"
    assert kinds(Ordering("global"), Sharded(UNEVEN, remote=True)) == "global"
    assert kinds(Ordering(), Sharded(UNEVEN, remote=True)) == "windows of 16 shards in 8 lanes"
    assert kinds(Ordering(), PartOfSource(Sharded(UNEVEN, remote=True), 3, 260)) == "windows of 16 shards in 8 lanes"
    assert kinds(Ordering(), Sharded(UNEVEN, remote=True), 16) == "global"  # 11 shards, 16 lanes
    assert kinds(Ordering("window", window=3), Sharded(UNEVEN), 24) == "windows of 3 shards in 8 lanes"
    assert kinds(Ordering("window"), Sharded(UNEVEN), 9) == "windows of 16 shards in 1 lane"
    monkeypatch.setattr("cmapkd.data.ordering.LARGE", 200)
    assert kinds(Ordering(), Sharded(UNEVEN)) == "windows of 16 shards in 8 lanes"
    joined = JoinedSource({"train": MemorySource(40), "extra": Sharded(UNEVEN)}, {"extra": 0.25})
    assert kinds(Ordering(), joined) == "train global, extra windows of 16 shards in 2 lanes"


def test_orders_that_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match=r"data\.order is window, and memory has no shards"):
        kinds(Ordering("window"), MemorySource(40))
    with pytest.raises(ConfigError, match=r"data\.lanes is 3, and a batch has 8 samples.*divisor of 8"):
        kinds(Ordering("window", 3), Sharded(UNEVEN))
    with pytest.raises(ValueError, match="places 0 to 9 cannot be read in 4 lanes of 67 samples"):
        order().samples(0, 0, 9)


def test_parts_know_their_shards() -> None:
    part = PartOfSource(Sharded(UNEVEN), 50, 90)
    assert shard_counts(part) is not None
    assert shard_counts(part).tolist() == [0, 0, 3, 7, 25, 5, 0, 0, 0, 0, 0, 0]  # type: ignore[union-attr]
    assert shard_counts(PartOfSource(MemorySource(40), 3, 9)) is None


def test_the_order_of_a_billion_samples_is_found_in_little_time_and_memory() -> None:
    counts = np.random.default_rng(0).integers(6000, 10000, 140_000)
    tracemalloc.start()
    start = time.process_time()
    made = WindowOrder(counts, lanes=64, rows=512, window=16, seed=0)
    made.samples(0, 0, 32768)
    took = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made.length > 1.1e9
    assert took < 1.0
    assert peak < 10 * 2**20


# ------------------------------------------------------------------------------------------------ tars


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve shards with 80 samples, of which five are damaged."""
    folder = tmp_path_factory.mktemp("tars")
    for shard, count in enumerate((5, 9, 3, 12, 7, 1, 8, 10, 4, 6, 11, 4)):
        members = []
        for number in range(count):
            key, bad = f"{number:04}", (shard * 13 + number) % 17 == 3
            members.append((f"{key}.png", b"damaged" if bad else picture(20 * shard + number)))
            members.append((f"{key}.txt", f"picture {number} of {shard}".encode()))
        write_tar(folder / f"{shard:03}.tar", members)
    return f"webdataset:{folder}/*.tar"


@pytest.mark.parametrize("kind", ["global", "window"])
@pytest.mark.parametrize(("world_size", "workers", "start"), [(1, 1, 0), (2, 0, 5), (4, 2, 0), (8, 0, 11), (2, 3, 8)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
def test_tars_are_read_alike_by_any_number_of_processes_and_workers(
    tars: str, kind: Any, world_size: int, workers: int, start: int
) -> None:
    """Begun anywhere, also within a window, as a resume does; a window is of about four steps."""
    whole = ids_of(tars, kind)
    parts = [ids_of(tars, kind, rank, world_size, workers=workers, start=start) for rank in range(world_size)]
    for step, (ids, bad) in enumerate(whole[start:]):
        assert tuple(chain.from_iterable(part[step][0] for part in parts)) == ids
        assert tuple(chain.from_iterable(part[step][1] for part in parts)) == bad
    assert sum(len(bad) for _, bad in whole) > 5


def ids_of(
    spec: str, kind: Any, rank: int = 0, world_size: int = 1, *, workers: int = 0, start: int = 0
) -> list[tuple[Any, Any]]:
    """Of every step up to the thirteenth, which is in the second epoch: ids, and what was bad."""
    source = open_source(spec)
    streams = Ordering(kind, 4, 2).streams(source, length=len(source), batch_size=8, seed=1)
    plans = PlanSampler(
        80, batch_size=8, seed=1, start=start, stop=13, rank=rank, world_size=world_size, streams=streams
    )
    built = make_builder(make_method("contrastive"), source, streams=streams)
    return [(batch.ids, batch.bad) for batch in make_loader(built, plans, workers=workers, pin_memory=False)]


@pytest.mark.parametrize("option", ["", "?limit=37", "?part=0.2-0.7", "?part=0.2-0.7&limit=20"])
def test_tars_know_how_many_of_their_samples_are_kept(tars: str, option: str) -> None:
    source = open_source(tars + option)
    counts = shard_counts(source)
    assert counts is not None
    ids = [source.id(index) for index in range(len(source))]  # type: ignore[attr-defined]
    assert counts.tolist() == [sum(name.startswith(f"{shard:03}/") for name in ids) for shard in range(12)]

"""Building: the same bytes however it was done, and nothing but a clear message where it cannot be."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cache_support import LENGTH, VIEWS, built, cache_plan, contents

from cmapkd.cache import CacheError, Wanted, all_keys, describe, keys_of_run, verify
from cmapkd.cache.folder import CacheFolder
from cmapkd.data.plans import PlanSampler
from cmapkd.data.types import Sample
from cmapkd.data.views import ViewSpec
from helpers import MemorySource, make_builder, make_method

forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class SlowSource(MemorySource):
    """Time enough to be killed in."""

    def __getitem__(self, index: int) -> Sample:
        time.sleep(0.001)
        return super().__getitem__(index)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A fork inherits none of torch's threads and would wait for them; and sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_child(work: Any) -> int:
    """The number of a forked process that does `work` and ends."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return child


# ------------------------------------------------------------------------------------------------ the same bytes


@forks
def test_killed_at_random_moments_it_ends_byte_identical(tmp_path: Path) -> None:
    source = SlowSource(LENGTH, bad=(3,), without_caption=(9,))
    whole = contents(built(tmp_path / "whole", source=source).path)
    assert sum(name.endswith(".rows") for name in whole) >= 8
    draws = random.Random(0)
    kills = rounds = 0
    while kills < 20:
        folder = tmp_path / f"killed-{rounds}"
        for _ in range(6):
            child = in_child(_build(folder, source))
            time.sleep(draws.uniform(0.0, 0.12))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                kills += 1
        done = {path.name: path.stat().st_mtime_ns for path in folder.rglob("shard-*.rows") if _recorded(path)}
        cache = built(folder, source=source)
        after = {path.name: path.stat().st_mtime_ns for path in folder.rglob("shard-*.rows")}
        assert done.items() <= after.items()  # what was finished was not done again
        assert contents(folder) == whole
        assert all(problem is None for _, problem in verify(cache))
        rounds += 1


def _build(folder: Path, source: Any, **options: Any) -> Any:
    return lambda: cache_plan(folder, source=source).build(device="cpu", **options)


def _recorded(path: Path) -> bool:
    return path.with_suffix(".json").exists()


@forks
def test_processes_share_the_shards_out(tmp_path: Path) -> None:
    whole = contents(built(tmp_path / "whole").path)
    source = MemorySource(LENGTH)
    children = [in_child(_build(tmp_path / "three", source, rank=rank, world_size=3)) for rank in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert contents(tmp_path / "three") == whole
    plan = cache_plan(tmp_path / "one of two")
    assert 0 < plan.build(device="cpu", rank=1, world_size=2).rows < len(plan.keys)
    with pytest.raises(CacheError, match=r"lacks \d+ of the 48 rows that this run reads"):
        plan.open()


@forks
def test_runs_that_read_other_rows_may_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = all_keys(LENGTH, 2)
    begin, folder = CacheFolder.add_part, tmp_path / "shared"
    others = [Wanted.of([(0, 20)]), Wanted.of([(10, 30)])]

    def overtaken(self: CacheFolder, *arguments: Any, **options: Any) -> None:
        if others:  # another run begins the part that this one is about to
            built(folder, keys=others.pop(0))
        begin(self, *arguments, **options)

    monkeypatch.setattr(CacheFolder, "add_part", overtaken)
    cache = built(folder, keys=keys)
    assert not others
    assert describe(cache)["shards_missing"] == 0
    assert sum(part.rows for part in cache.parts()) == len(keys)  # none twice
    assert all(problem is None for _, problem in verify(cache))
    plan = cache_plan(folder, keys=keys)
    assert plan.open().num_absent(keys) == 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(tmp_path: Path) -> None:
    cache_plan(tmp_path / "workers").build(device="cpu", workers=2)
    assert contents(tmp_path / "workers") == contents(built(tmp_path / "alone").path)


# ------------------------------------------------------------------------------------------------ what is covered


@pytest.mark.parametrize(("length", "steps", "num_views"), [(24, 7, 2), (300, 9, None), (50, 20, 3), (24, 2, None)])
def test_keys_are_what_the_run_reads(length: int, steps: int, num_views: int | None) -> None:
    views = ViewSpec(num_views=num_views)
    sampler = PlanSampler(length, batch_size=8, seed=3, start=0, stop=steps)
    read = {views.view_number(plan.epoch) * length + index for plan in sampler for index in plan.everyone}
    keys = keys_of_run(length, batch_size=8, seed=3, steps=steps, views=views).listed()
    assert read <= {*keys.tolist()}
    assert keys.tolist() == sorted({*keys.tolist()})
    if length == 300:
        assert len(read) == len(keys)  # far from all samples: no more than needed


def test_another_run_adds_what_it_lacks(tmp_path: Path) -> None:
    source = MemorySource(300)
    some = keys_of_run(300, batch_size=8, seed=0, steps=5, views=VIEWS)
    others = keys_of_run(300, batch_size=8, seed=1, steps=5, views=VIEWS)
    first = cache_plan(tmp_path / "c", source=source, keys=some)
    assert first.build(device="cpu").rows == 40
    assert first.build(device="cpu").rows == 0
    second = cache_plan(tmp_path / "c", source=source, keys=others)
    new = len({*others.listed().tolist()} - {*some.listed().tolist()})
    assert second.bytes_missing() == new * second.layout.row_bytes
    assert second.build(device="cpu").rows == new
    cache = CacheFolder.open(tmp_path / "c")
    assert [part.start for part in cache.parts()] == [None, None]
    reader = second.open()
    assert reader.num_absent(Wanted.of((), np.union1d(some.listed(), others.listed()))) == 0
    assert reader.num_absent(all_keys(300, 1))
    found = describe(cache)
    assert (found["rows_done"], found["shards_missing"]) == (40 + new, 0)
    assert found["fidelity"]["rows"] == 40 + new
    assert found["fidelity"]["cosine_min"]["image"] == pytest.approx(1.0)
    assert found["fidelity"]["same_nearest"] == 1.0


@pytest.mark.parametrize(("store", "numbers"), [("fp32", 4), ("fp16", 2), ("int8", 1)])
def test_bytes_of_a_row(store: str, numbers: int, tmp_path: Path) -> None:
    layout = cache_plan(tmp_path, store=store).layout
    assert layout.row_bytes == 8 + 2 * 24 * numbers + (2 * 2 if store == "int8" else 0)
    assert type(layout).from_plain(layout.plain()) == layout


# ------------------------------------------------------------------------------------------------ what a disk can do


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "is full: free some"), (errno.EROFS, "cannot be written")]
)
def test_a_disk_that_refuses(number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(built(tmp_path / "whole").path)
    calls = 0
    flush = os.fsync

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr("cmapkd.cache.files.os.fsync", failing)
    with pytest.raises(CacheError, match=message):
        built(tmp_path / "cut")
    left = contents(tmp_path / "cut")
    assert left
    assert left.items() < whole.items()  # finished files as they must be, and nothing half written
    assert contents(built(tmp_path / "cut").path) == whole


def test_what_is_too_large_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match=r"more than cache.max_gib 1e-06: read fewer samples .*length=50000"):
        built(tmp_path / "c", max_gib=1e-6)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(CacheError, match=r"the disk of .* has 0.00 GiB left"):
        built(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_answers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    method = make_method("clip_kd")
    assert method.teacher is not None
    with torch.no_grad():
        method.teacher.model.vision.project.weight.mul_(1e9)  # type: ignore[attr-defined,union-attr,operator]
    with pytest.raises(
        CacheError, match=r"image of sample 'm0' is not finite in its copy in fp16: use cache.store=fp32"
    ):
        built(tmp_path / "c", method, store="fp16")
    assert not [*(tmp_path / "c").rglob("*.rows")]
    built(tmp_path / "d", method, store="fp32")


@forks
def test_readers_do_not_disturb_a_build(tmp_path: Path) -> None:
    source = SlowSource(LENGTH)
    first = cache_plan(tmp_path / "c", source=source, keys=all_keys(LENGTH, 1))
    first.build(device="cpu")
    builder = in_child(_build(tmp_path / "c", source))

    def read() -> None:
        for _ in range(3):
            made = make_builder(make_method("clip_kd"), source, views=VIEWS, stored={"teacher": first.open()})
            sampler = PlanSampler(LENGTH, batch_size=8, seed=0, start=0, stop=3)
            assert all(len(made[plan].stored["teacher"].missing) == 0 for plan in sampler)

    readers = [in_child(read) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in (builder, *readers)] == [0, 0, 0]
    cache_plan(tmp_path / "c", source=source).open()

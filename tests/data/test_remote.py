"""Remote tars: the samples of local ones, within a room on the disk, whatever the store does."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import pytest
from remotes import BATCH, IN_SHARD, SHARDS, assert_same, be_impatient, read, write_shards
from serving import Serving, serving

from cmapkd.config import ConfigError
from cmapkd.data import shard_files, stores
from cmapkd.data.loading import make_loader
from cmapkd.data.open import open_source, same_reading
from cmapkd.data.ordering import Ordering, describe
from cmapkd.data.plans import PlanSampler
from cmapkd.data.shard_set import ShardWarning
from cmapkd.data.shards import ShardSource
from cmapkd.data.types import BadSampleError
from helpers import make_builder, make_method

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*remote shards? of"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a single core
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("store")
    write_shards(place)
    return place


@pytest.fixture
def store(folder: Path) -> Iterator[Serving]:
    pytest.importorskip("aiohttp", reason="of the extra http: uv sync")
    with serving(folder) as state:
        yield state


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_impatient(monkeypatch, tmp_path / "cache")


def remote(store: Serving, names: str = "{000..015}.tar", *, room: int | None = None) -> ShardSource:
    disk = "" if room is None else f"?disk={room / 2**30!r}"
    source = open_source(f"webdataset:{store.url}/{names}{disk}")
    assert isinstance(source, ShardSource)
    return source


def taken(tmp_path: Path) -> int:
    """Bytes of copies, and of what is being fetched.

    Counted under the lock of whoever makes room: otherwise a copy that goes and a piece that grows would both count.
    """
    folder, found = tmp_path / "cache" / "cmapkd" / "shards", 0
    with (folder / "room.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for file in folder.glob("*"):
            if file.suffix in (".tar", ".part"):
                with suppress(OSError):
                    found += file.stat().st_size
    return found


# ------------------------------------------------------------------------------------------------ as local ones


@pytest.mark.parametrize(("kind", "workers"), [("window", 2), ("global", 0)])
def test_batches_are_those_of_local_tars(kind: str, workers: int, folder: Path, store: Serving) -> None:
    local = open_source(f"webdataset:{folder}/*.tar")
    there = remote(store)
    assert len(there) == len(local) == SHARDS * IN_SHARD
    assert there.fingerprint() == local.fingerprint()
    assert there.id(40) == local.id(40)  # type: ignore[attr-defined]
    assert_same(read(there, kind=kind, workers=workers), read(local, kind=kind))


@pytest.mark.parametrize("pattern", ["*.tar", "", "{000..015}.tar"])
def test_any_protocol_of_fsspec_will_do(pattern: str, folder: Path) -> None:
    there, local = open_source(f"webdataset:file://{folder}/{pattern}"), open_source(f"webdataset:{folder}/*.tar")
    assert isinstance(there, ShardSource)
    assert there.remote
    assert there.fingerprint() == local.fingerprint()
    assert there[40].captions == local[40].captions


def test_a_second_opening_fetches_nothing(store: Serving) -> None:
    with pytest.warns(ShardWarning, match="3 remote shards of 3 have no index on this machine yet"):
        remote(store, "{000..002}.tar")
    before = sum(store.bodies.values())
    again = remote(store, "{000..002}.tar")
    assert again[7].captions == ("picture 1 of 1",)
    assert sum(store.bodies.values()) == before  # the copies are still there


def test_remote_shards_are_read_in_windows_if_nothing_else_is_said(store: Serving) -> None:
    source = remote(store)
    assert describe(Ordering().streams(source, length=len(source), batch_size=8, seed=0)).startswith("windows of 16")


def test_a_source_goes_to_other_processes_by_pickle(store: Serving) -> None:
    source = pickle.loads(pickle.dumps(remote(store, "{000..002}.tar")))  # noqa: S301 - our own
    assert source[13].captions == ("picture 1 of 2",)


def test_where_copies_lie_is_no_other_reading() -> None:
    assert same_reading("webdataset:s3://a/{0..3}.tar?disk=5", "webdataset:s3://b/{0..3}.tar?disk=9&copies=/tmp")
    assert not same_reading("webdataset:s3://a/{0..3}.tar?disk=5", "webdataset:s3://a/{0..3}.tar?limit=5")


# ------------------------------------------------------------------------------------------------ room on the disk


def test_copies_keep_to_their_room_and_few_are_fetched_again(store: Serving, tmp_path: Path) -> None:
    room = 10 * 31_000
    source = remote(store, room=room)
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], taken(tmp_path))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    store.bodies.clear()
    read(source, lanes=2)
    stop.set()
    watcher.join()
    total = sum(file.stat().st_size for file in store.folder.iterdir())
    assert total > 1.1 * room
    assert 0.5 * room < most[0] <= room
    assert sum(store.bodies.values()) <= 1.15 * total  # shards that two lanes share; here 2 of 16 lie at such an edge


def test_room_for_less_than_what_is_read_at_a_time_is_refused(store: Serving) -> None:
    with pytest.raises(ConfigError, match=r"the largest shard has .*: give room for two at least"):
        remote(store, room=30_000)
    source = remote(store, room=6 * 25_000)
    with pytest.raises(ConfigError, match=r"shards of .* are read at a time .* or set data.window=1"):
        read(source)
    with pytest.raises(ConfigError, match=r"data.order=global reads everywhere: set data.order=window"):
        read(source, kind="global")


def test_options_of_copies_are_for_remote_shards(folder: Path) -> None:
    with pytest.raises(ConfigError, match="lies on this machine: leave out the options disk, copies and counts"):
        open_source(f"webdataset:{folder}/*.tar?disk=3")


# ------------------------------------------------------------------------------------------------ faults of a store


def test_answers_that_fail_or_end_early_are_asked_for_again(folder: Path, store: Serving) -> None:
    store.latency = 0.002
    for shard in range(SHARDS):
        store.failing[f"{shard:03}.tar"] = shard % 4
        store.cutting[f"{shard:03}.tar"] = shard % 3
    source = remote(store)
    local = open_source(f"webdataset:{folder}/*.tar")
    assert_same(read(source, workers=1), read(local))


def reason_of(source: ShardSource, index: int) -> str:
    with pytest.raises(BadSampleError) as bad:
        source[index]
    return bad.value.reason


def opened_then_empty(store: Serving, tmp_path: Path) -> ShardSource:
    """Indexes are there, copies are not."""
    source = remote(store)
    for file in (tmp_path / "cache" / "cmapkd" / "shards").glob("*.tar"):
        file.unlink()
    return source


def test_a_store_that_fails_is_a_counted_fault(store: Serving, tmp_path: Path) -> None:
    source = opened_then_empty(store, tmp_path)
    store.failing["003.tar"] = 10**6
    reason = reason_of(source, 3 * IN_SHARD)
    assert "003.tar cannot be read" in reason
    assert "503" in reason
    assert f"({stores.TRIES} tries in" in reason
    asked = store.asked.total()
    assert reason_of(source, 3 * IN_SHARD + 1) == reason  # known by now
    assert store.asked.total() == asked
    whole = read(source)
    bad = dict(chain.from_iterable(batch.bad for batch in whole))
    assert {name for name in bad if name.startswith("003/")} == {f"003/{number:03}" for number in range(IN_SHARD)}
    assert all(len(set(batch.ids)) == BATCH for batch in whole)


def test_a_store_that_drips_is_a_counted_fault(store: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened_then_empty(store, tmp_path)
    monkeypatch.setattr(stores, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(stores, "TRIES", 2)
    store.dripping.add("002.tar")
    start = time.monotonic()
    reason = reason_of(source, 2 * IN_SHARD)
    assert "002.tar cannot be read: no answer within 0.3 s (2 tries" in reason
    assert time.monotonic() - start < 20
    assert source[0].captions == ("picture 0 of 0",)


def test_a_shard_that_changes_is_a_counted_fault(store: Serving, tmp_path: Path) -> None:
    source = opened_then_empty(store, tmp_path)
    store.tags["004.tar"] = "other"
    reason = reason_of(source, 4 * IN_SHARD)
    assert "file has changed since it was opened" in reason
    assert "with another tag" in reason


def test_a_store_that_lies_is_a_counted_fault(store: Serving, tmp_path: Path) -> None:
    source = opened_then_empty(store, tmp_path)
    store.lies.add("004.tar")
    reason = reason_of(source, 4 * IN_SHARD)
    assert "004.tar holds other bytes than when it was opened, of the same size and tag (CRC-32" in reason
    assert not list((tmp_path / "cache" / "cmapkd" / "shards").glob("*.part"))


def test_a_failed_shard_is_asked_for_again_later(
    store: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened_then_empty(store, tmp_path)
    store.failing["003.tar"] = 10**6
    reason_of(source, 3 * IN_SHARD)
    store.failing.clear()
    monkeypatch.setattr(shard_files, "FAILED_FOR", 0.0)
    assert source[3 * IN_SHARD].captions == ("picture 0 of 3",)


def test_a_set_with_a_shard_that_is_not_there_is_not_opened(store: Serving) -> None:
    """Local ones are left out with a warning; here another opening might find it, and read other batches."""
    store.gone.add("002.tar")
    with pytest.raises(ConfigError, match=r"002.tar cannot be read: .*404"):
        remote(store, "{000..004}.tar")


def test_protocols_that_are_not_there_are_named() -> None:
    with pytest.raises(ConfigError, match="nowhere:// is no protocol that fsspec knows"):
        open_source("webdataset:nowhere://bucket/{000..004}.tar")


# ------------------------------------------------------------------------------------------------ other processes


def test_processes_share_what_was_fetched(store: Serving, tmp_path: Path) -> None:
    """Four readers of one shard fetch it once."""
    source = opened_then_empty(store, tmp_path)
    store.bodies.clear()
    store.latency = 0.05
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=source.__getitem__, args=(7 * IN_SHARD + number,)) for number in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
        assert reader.exitcode == 0
    assert store.fetched("007.tar") == 1.0


def test_a_kill_while_fetching_leaves_nothing_in_the_way(store: Serving, tmp_path: Path) -> None:
    source = opened_then_empty(store, tmp_path)
    store.dripping.add("006.tar")
    reader = multiprocessing.get_context("fork").Process(target=source.__getitem__, args=(6 * IN_SHARD,))
    reader.start()
    copies = tmp_path / "cache" / "cmapkd" / "shards"
    for _ in range(600):
        if list(copies.glob("*.part")):
            break
        time.sleep(0.05)
    time.sleep(0.1)
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGKILL)
    reader.join()
    assert list(copies.glob("*.part"))
    store.dripping.clear()
    assert source[0].captions == ("picture 0 of 0",)  # whoever makes room removes the piece
    assert not list(copies.glob("*.part"))
    assert source[6 * IN_SHARD].captions == ("picture 0 of 6",)


def test_shards_are_fetched_before_they_are_read(store: Serving, tmp_path: Path) -> None:
    source = opened_then_empty(store, tmp_path)
    streams = Ordering("window", 4, 2).streams(source, length=len(source), batch_size=BATCH, seed=1)
    plans = PlanSampler(len(source), batch_size=BATCH, seed=1, start=0, stop=12, streams=streams)
    loader = make_loader(
        make_builder(make_method("contrastive"), source, streams=streams), plans, workers=0, pin_memory=False
    )
    next(loader)
    order = streams[0].order
    assert order is not None
    soon = order.shards(0, 0, order.size * 4)
    copies = tmp_path / "cache" / "cmapkd" / "shards"
    for _ in range(600):
        if len(list(copies.glob("*.tar"))) >= len(soon):
            break
        time.sleep(0.05)
    before = sum(store.bodies.values())
    for _ in range(order.size // 2 - 1):  # steps of the first windows
        next(loader)
    assert sum(store.bodies.values()) >= before  # later ones may have come
    assert {store.fetched(f"{shard:03}.tar") for shard in soon.tolist()} == {2.0}  # for its index, and now
    loader.close()

"""Workers that are killed in each state, shared memory that is full, and workers that do not fork."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from cmapkd.config import ConfigError
from cmapkd.data import ring
from cmapkd.data.loading import make_loader
from cmapkd.data.open import open_source
from cmapkd.data.plans import PlanSampler
from cmapkd.data.ring import Blocks, Raised, Ring, Room, filling, pack, stack, unpack
from cmapkd.data.types import BadSampleError
from cmapkd.data.workers import ReadAhead, WorkerDied, WorkerWarning, slot_bytes
from helpers import digest, make_builder, make_method

pytestmark = pytest.mark.usefixtures("one_thread")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly:
    """Kills the process that packs it."""

    def __reduce__(self) -> Any:
        die()
        return int, ()


class Items(Dataset[Any]):
    """Numbers with a tensor; the process that makes one of them is killed once, in the state that `when` names."""

    def __init__(self, mark: Path, when: str, at: int = 5, size: int = 1000) -> None:
        self.mark, self.when, self.at, self.size = mark, when, at, size

    def __getitem__(self, number: int) -> Any:
        now = number == self.at and not self.mark.exists()
        if now:
            self.mark.touch()
        if now and self.when == "reading":
            die()
        made = stack([torch.full((self.size,), number)] * 2)
        if now and self.when == "its tensors are in the slot":
            die()
        if now and self.when == "packing":
            return made, Deadly()
        return made, number


STATES = ["reading", "its tensors are in the slot", "packing"]


def check(found: Any, number: int, size: int = 1000) -> None:
    assert found[1] == number
    assert torch.equal(found[0], torch.full((2, size), number))


@pytest.mark.parametrize("when", STATES)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("item_bytes", [0, 16_000])
def test_a_worker_that_is_killed_while_it_makes_something(
    when: str, workers: int, item_bytes: int, tmp_path: Path
) -> None:
    ahead = ReadAhead(Items(tmp_path / "mark", when), range(30), workers=workers, item_bytes=item_bytes)
    with pytest.warns(WorkerWarning, match=r"a data worker died \(by signal SIGKILL\) while reading \d+ or what"):
        for number, found in enumerate(ahead):
            check(found, number)
    assert number == 29
    assert not active_children()


def test_a_worker_that_is_killed_while_it_waits_for_work(tmp_path: Path) -> None:
    """It has made all that there is room for."""
    items = iter(ReadAhead(Items(tmp_path / "mark", ""), range(30), workers=1))
    check(next(items), 0)
    time.sleep(0.5)
    (worker,) = active_children()
    worker.kill()
    with pytest.warns(WorkerWarning):
        for number, found in enumerate(items, 1):
            check(found, number)
    assert number == 29


def test_a_worker_that_is_killed_while_it_speaks(tmp_path: Path) -> None:
    """What does not fit into its slot goes through a pipe: half of it is there when it dies."""
    size = 10**6
    items = iter(ReadAhead(Items(tmp_path / "mark", "", size=size), range(6), workers=1))
    check(next(items), 0, size)
    (worker,) = active_children()
    deadline = time.monotonic() + 20
    while "S" not in Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline
    time.sleep(0.5)  # it waits for its pipe to be read
    worker.kill()
    worker.join()
    with pytest.warns(WorkerWarning, match=r"while reading [12] or"):  # 1 may have come whole together with 0
        for number, found in enumerate(items, 1):
            check(found, number, size)
    assert number == 5


def test_others_go_on_where_one_is_replaced(tmp_path: Path) -> None:
    before = {each.pid for each in active_children()}
    items = iter(ReadAhead(Items(tmp_path / "mark", "reading", at=9), range(40), workers=2))
    check(next(items), 0)
    first = {each.pid for each in active_children()} - before
    with pytest.warns(WorkerWarning):
        for number in range(1, 30):
            check(next(items), number)
    second = {each.pid for each in active_children()} - before
    assert len(first) == len(second) == 2
    assert len(first & second) == 1
    items.close()  # type: ignore[attr-defined]
    assert not {each.pid for each in active_children()} & second


class Broken(Exception):
    """One that is not rebuilt from its arguments."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


class Failing(Dataset[Any]):
    def __getitem__(self, number: int) -> Any:
        if number == 1:
            raise BadSampleError("a", "its reason")
        if number == 2:
            raise Broken(3, 4)
        if number == 3:
            return lambda: None  # which cannot be sent
        return number


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [(1, BadSampleError, "sample 'a': its reason"), (2, RuntimeError, "Broken: 3 and 4"), (3, Exception, "lambda")],
)
def test_errors_come_in_their_turn_with_the_lines_where_they_were_raised(
    number: int, kind: type[Exception], said: str
) -> None:
    items = iter(ReadAhead(Failing(), [0, number, 0], workers=1))
    assert next(items) == 0
    with pytest.raises(kind, match=said) as caught:
        next(items)
    assert "In a data worker:" in caught.value.__notes__[0]
    assert not active_children()


# ------------------------------------------------------------------------------------------------ slots


@pytest.mark.parametrize("size", [0, 100, 10**5])
def test_what_is_packed_comes_out_the_same_and_alone(size: int) -> None:
    shared = torch.arange(12, dtype=torch.int16).view(3, 4)
    kinds = [
        shared,
        shared,
        shared.T,
        torch.tensor(2.5),
        torch.empty(0, 3),
        torch.ones(2, dtype=torch.bool),
        torch.randn(5).to(torch.bfloat16),
        torch.nn.Parameter(torch.ones(2)),
        "text",
        torch.ones(size),
    ]
    slots = Ring(2, slot_bytes(1000))
    memory = slots[1]
    with filling(Room(memory)):
        kinds.append(stack([torch.full((3,), 7), torch.full((3,), 8)]))
    found = unpack(pack(kinds, room := Room(memory)), memory)
    assert room.used <= len(memory)
    memory.fill_(255)
    assert found[0] is found[1]
    for one, other in zip(kinds, found, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other) or one is kinds[-1]
            assert one.dtype == other.dtype
        else:
            assert one == other


def test_memory_is_used_again_once_nothing_is_in_it() -> None:
    blocks, size = Blocks(), 2**20
    first = blocks.take(size)
    place, view = first.data_ptr(), first.fill_(7)[4:8].view(torch.int32)
    del first
    second = blocks.take(size).fill_(1)
    assert second.data_ptr() != place
    assert view.tolist() == [7 * 0x01010101]  # a view keeps the whole
    del view
    assert blocks.take(size + 1).data_ptr() != place
    again = blocks.take(size)
    assert again.data_ptr() == place
    del blocks
    assert again.fill_(2).sum() == 2 * size


def test_batches_that_are_kept_keep_their_contents(tmp_path: Path) -> None:
    size = 10**6  # so that memory is used again
    kept, seen = [], []
    for number, found in enumerate(ReadAhead(Items(tmp_path / "mark", "", size=size), range(8), workers=1)):
        seen.append(found[0].data_ptr())
        if number % 3 == 0:
            kept.append(found)
    for number, found in enumerate(kept):
        check(found, 3 * number, size)
    assert len(set(seen)) < 8


def test_errors_of_workers_keep_their_kind() -> None:
    error = Raised(ConfigError("wrong", ("a",))).again()
    assert isinstance(error, ConfigError)
    assert error.problems == ("a",)


def full(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """Shared memory that has room for so many slots."""
    given = iter(range(slots))

    def fallocate(*_: int) -> None:
        if next(given, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)


def test_full_shared_memory_makes_the_ring_smaller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full(monkeypatch, 3)
    with pytest.warns(WorkerWarning, match="/dev/shm is full: data workers make 3 items ahead, not 8"):
        for number, found in enumerate(ReadAhead(Items(tmp_path / "mark", ""), range(30), workers=2)):
            check(found, number)
    assert number == 29


def test_shared_memory_without_room_for_one_slot_ends_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full(monkeypatch, 0)
    with pytest.raises(WorkerDied, match=r"/dev/shm has no room for 0 MiB \(No space .*data.workers=0"):
        list(ReadAhead(Items(tmp_path / "mark", ""), range(30), workers=2))
    assert not active_children()


def test_a_real_small_disk_is_an_error_and_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if (done := subprocess.run(command, capture_output=True, check=False)).returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
    try:
        monkeypatch.setattr(ring, "SHARED_MEMORY", str(tmp_path))
        slots = Ring(4, slot_bytes(300_000))
        with pytest.raises(ring.NoRoom):
            for slot in range(4):
                slots.reserve(slot)
                slots[slot].fill_(1)  # takes no memory that is not there, which would kill this process
        assert slots.has(1)
        assert not slots.has(3)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


# ------------------------------------------------------------------------------------------------ without a fork


@pytest.fixture(params=["spawn", "forkserver"])
def method(request: pytest.FixtureRequest) -> Iterator[str]:
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow  # each process imports torch anew
def test_a_ring_reaches_workers_that_do_not_fork(method: str, tmp_path: Path) -> None:
    """Sources with their pictures, and the death of a worker."""
    (folder := tmp_path / "images").mkdir()
    for number in range(24):
        Image.new("RGB", (30, 20), (number, 9, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"red boat {number}")
    builder = make_builder(make_method("contrastive"), open_source(f"folder:{folder}", require_captions=True))
    sampler = PlanSampler(24, batch_size=8, seed=0, start=0, stop=6)
    alone = [digest(batch) for batch in make_loader(builder, sampler, workers=0, pin_memory=False)]
    loader = make_loader(builder, sampler, workers=1, pin_memory=False)
    helped = [digest(next(loader))]
    (worker,) = active_children()
    worker.kill()
    with pytest.warns(WorkerWarning):
        helped += [digest(batch) for batch in loader]
    assert helped == alone

"""Checkpoints are written beside the training: the same bytes, in the same order, and nothing is lost in silence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.config import DiskError
from cmapkd.training import Interrupted, Trainer, checkpoint
from cmapkd.training.background import Background, HostCopies
from cmapkd.training.checkpoint import Progress, list_checkpoints, read_checkpoint, write_checkpoint
from helpers import make_method, make_trainer

PATIENCE = 60.0  # seconds, in which a test that hangs fails


def test_jobs_are_done_in_their_order() -> None:
    background, done, go = Background(), list[str](), threading.Event()
    background.start("first", lambda: (go.wait(PATIENCE), done.append("first"))[-1])
    background.start("second", lambda: done.append("second"))
    assert done == []
    go.set()
    background.wait()
    assert done == ["first", "second"]


def test_what_waits_behind_a_job_that_failed_is_left_undone() -> None:
    background, done, go = Background(), list[int](), threading.Event()

    def fail() -> None:
        go.wait(PATIENCE)
        raise OSError(errno.ENOSPC, "full")

    background.start("first", fail)
    background.start("second", lambda: done.append(2))
    go.set()
    with pytest.raises(OSError, match="full"):
        background.wait("second")
    assert done == []
    background.wait()  # told once
    background.start("third", lambda: done.append(3))
    background.wait()
    assert done == [3]


def test_copies_do_not_change_with_what_they_are_of_and_use_their_memory_again() -> None:
    copies, weights = HostCopies(), torch.ones(2, 3)
    tied = {"a": weights, "b": weights, "t": weights.T, "count": torch.tensor(4)}
    first = copies.of({"method": tied})["method"]
    weights.mul_(2)
    assert all(torch.equal(first[name], torch.ones_like(value)) for name, value in tied.items() if name != "count")
    assert len({value.data_ptr() for value in first.values()}) == len(first)
    places = {name: value.data_ptr() for name, value in first.items()}
    second = copies.of({"method": tied | {"new": torch.zeros(5)}})["method"]
    assert torch.equal(second["t"], 2 * torch.ones(3, 2))
    assert {name: value.data_ptr() for name, value in second.items() if name != "new"} == places
    other = copies.of({"method": {"a": torch.zeros(7)}})["method"]  # a smaller student
    assert torch.equal(other["a"], torch.zeros(7))


class Held:
    """A `write_checkpoint` that waits until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go, self.written = threading.Event(), threading.Event(), list[str]()
        self._write = checkpoint.write_checkpoint
        monkeypatch.setattr(checkpoint, "write_checkpoint", self)

    def __call__(self, path: Path, *arguments: Any) -> None:
        self.began.set()
        assert self.go.wait(PATIENCE)
        self._write(path, *arguments)
        self.written.append(path.name)


def running(out: Path, **options: Any) -> Trainer:
    made: Trainer = make_trainer(out, make_method("contrastive"), steps=6, ema=0.9, **options)
    return made


def test_steps_go_on_while_a_checkpoint_is_written_and_it_holds_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    trained = running(tmp_path / "a", checkpoint_every=3)
    step = trained._step

    def counted(batch: Any) -> Any:
        if trained.progress.step == 5:
            assert held.began.wait(PATIENCE)
            assert held.written == []  # two steps later
            held.go.set()
        return step(batch)

    trained._step = counted  # type: ignore[method-assign]
    trained.run()
    assert held.written == ["step-000000003", "step-000000006"]
    whole = running(tmp_path / "b", checkpoint_every=3)
    save = whole._save

    def save_now() -> None:
        save()
        whole.state.finish()

    whole._save = save_now  # type: ignore[method-assign]
    whole.run()
    files = [path.name for path in (tmp_path / "a/checkpoints/step-000000003").glob("*.safetensors")]
    assert {"method.safetensors", "optimizer.safetensors", "average.safetensors", "random-0.safetensors"} == {*files}
    for name in files:
        one, other = (tmp_path / f"{run}/checkpoints/step-000000003/{name}" for run in "ab")
        assert one.read_bytes() == other.read_bytes(), name


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    trained = running(tmp_path, checkpoint_every=1, keep_checkpoints=9)
    save, saves = trained._save, list[int]()

    def noted() -> None:
        if len(saves) == 1:
            threading.Timer(0.05, held.go.set).start()
        save()
        saves.append(len(held.written))

    trained._save = noted  # type: ignore[method-assign]
    trained.run()
    assert all(written >= number for number, written in enumerate(saves))  # all before it, when a save returns
    assert held.written == [f"step-{number:09d}" for number in range(1, 7)]


def test_a_run_that_is_stopped_ends_with_its_checkpoint_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    trained = running(tmp_path)
    agreed = trained._agreed
    trained._agreed = lambda stop: agreed(stop) or trained.progress.step == 2  # type: ignore[method-assign]
    threading.Timer(0.05, held.go.set).start()
    with pytest.raises(Interrupted, match="saved step-000000002"):
        trained.run()
    assert held.written == ["step-000000002"]


def test_an_error_of_the_run_waits_for_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    trained = running(tmp_path, checkpoint_every=2)
    step = trained._step
    trained._step = lambda batch: step(batch) if trained.progress.step < 2 else 1 / 0  # type: ignore
    threading.Timer(0.05, held.go.set).start()
    with pytest.raises(ZeroDivisionError):
        trained.run()
    assert held.written == ["step-000000002"]


@pytest.mark.parametrize("at", [2, 6])
def test_a_disk_that_refuses_is_told_of_at_the_next_save_or_the_end(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_checkpoint

    def refuse(path: Path, tensors: Any, progress: Progress) -> None:
        if progress.step == at:
            raise DiskError("the disk is full")
        write(path, tensors, progress)

    monkeypatch.setattr(checkpoint, "write_checkpoint", refuse)
    with pytest.raises(DiskError, match="full"):
        running(tmp_path, checkpoint_every=2).run()
    kept = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert kept == ([] if at == 2 else ["step-000000002", "step-000000004"])


def test_a_torn_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the checkpoint of step 4 some files are there when the process ends; the resumed run ends as another."""
    whole = running(tmp_path / "whole", checkpoint_every=2)
    whole.run()
    fsync, calls = os.fsync, list[int]()

    def end(number: int) -> None:
        calls.append(number)
        if len(calls) == 12:  # in the second checkpoint, of eight flushes each
            raise KeyboardInterrupt
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", end)
        with pytest.raises(KeyboardInterrupt):
            running(tmp_path / "torn", checkpoint_every=2).run()
    assert [path.name for path in list_checkpoints(tmp_path / "torn/checkpoints")] == ["step-000000002"]
    resumed = running(tmp_path / "torn", checkpoint_every=2)
    resumed.run(resume=True)
    state = resumed.method.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.method.state_dict().items())


def test_checkpoints_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001"
    write_checkpoint(path, {"method": {"a": torch.ones(3)}}, Progress(step=1))
    checksums = json.loads((path / "checksums.json").read_text())
    assert {len(checksum) for checksum in checksums.values()} == {64}
    for name in checksums:
        checksums[name] = hashlib.blake2b((path / name).read_bytes(), digest_size=16).hexdigest()
    (path / "checksums.json").write_text(json.dumps(checksums))
    assert torch.equal(read_checkpoint(path)[0]["method"]["a"], torch.ones(3))
    (path / "method.safetensors").write_bytes((path / "method.safetensors").read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"method.safetensors is damaged"):
        read_checkpoint(path)

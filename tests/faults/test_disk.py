"""A disk that is full or read-only, and checkpoints that it damages: what is kept, and what is said."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.config import DiskError
from cmapkd.config.disk import write_text
from cmapkd.run import RunConfig, run
from cmapkd.training import Trainer, checkpoint
from cmapkd.training.checkpoint import CheckpointWarning, list_checkpoints, read_checkpoint, write_checkpoint
from cmapkd.training.trackers import JsonlTracker
from helpers import DropoutStudent, make_method, make_model, make_trainer, read_lines

STEPS = 6


def start(out: Path, *, seed: int = 0, **options: Any) -> Trainer:
    student = make_model(seed=seed, kind=DropoutStudent)
    made = make_trainer(out, make_method("contrastive", student=student), steps=STEPS, checkpoint_every=2, **options)
    torch.manual_seed(seed)
    return made


def weights(done: Trainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in done.method.state_dict().items()}


def assert_same(one: Trainer, other: Trainer) -> None:
    mine, theirs = weights(one), weights(other)
    assert not [key for key in mine if not torch.equal(mine[key], theirs[key])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    made = start(tmp_path_factory.mktemp("whole"))
    made.run()
    return made


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))


# ------------------------------------------------------------------------------------------------ full


def test_a_real_full_disk_keeps_the_last_checkpoint_and_resumes(disk: Path, whole: Trainer) -> None:
    out = disk / "run"
    running = start(out)
    save = running._save

    def fill_then_save() -> None:
        if running.progress.step == 4:
            fill(disk)
        save()

    running._save = fill_then_save  # type: ignore[method-assign]
    with pytest.raises(DiskError, match=r"the disk of .*checkpoints is full: free some space and resume the run"):
        running.run()
    assert names(out) == ["step-000000002"]  # and nothing half written, which would take up space
    assert read_checkpoint(list_checkpoints(out / "checkpoints")[-1])[1].step == 2
    (disk / "filler").unlink()
    resumed = start(out, seed=9)
    resumed.run(resume=True)
    assert_same(resumed, whole)
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("when", ["checkpoint", "line", "line of validation", "bad samples"])
def test_wherever_the_disk_refuses_the_error_says_so(
    number: int, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    running = start(tmp_path, evaluate_every=3, validate=lambda _: {"score": 1.0})
    if when == "checkpoint":
        monkeypatch.setattr(checkpoint, "save_file", refuse)
    elif when == "bad samples":
        monkeypatch.setattr(type(running.ledger), "write", refuse)
    else:
        log = JsonlTracker.log

        def log_or_refuse(self: JsonlTracker, step: int, values: dict[str, float]) -> None:
            if step >= 3 and ("validation/score" in values) == (when == "line of validation"):
                refuse()
            log(self, step, values)

        monkeypatch.setattr(JsonlTracker, "log", log_or_refuse)
    said = {errno.EROFS: "cannot be written", errno.EIO: "does not answer"}.get(number, "is full")
    with pytest.raises(DiskError, match=said):
        running.run()


def test_a_full_disk_does_not_hide_why_the_run_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    running = start(tmp_path)
    monkeypatch.setattr(type(running.ledger), "write", refuse)
    monkeypatch.setattr(JsonlTracker, "close", lambda self: self._file.close() or refuse())
    monkeypatch.setattr(Trainer, "_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        running.run()


def test_tensorboard_on_a_full_disk(disk: Path) -> None:
    pytest.importorskip("tensorboard")
    running = start(disk / "run", trackers=("tensorboard",))

    step = running._step
    running._step = lambda batch: fill(disk) or step(batch) if running.progress.step == 2 else step(batch)  # type: ignore
    with pytest.raises(DiskError, match="is full"):
        running.run()


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.json", "before")

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskError, match="is full"):
        write_text(tmp_path / "a.json", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "before"


# ------------------------------------------------------------------------------------------------ read-only


def test_a_run_into_a_read_only_folder(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    config = RunConfig.from_mapping(
        {
            "student": "tiny:debug",
            "data": {"train": "scenes?length=32&size=32"},
            "method": "contrastive",
            "training": {"steps": 2, "batch_size": 8, "device": "cpu"},
        }
    )
    with pytest.raises(DiskError, match=r"cannot be written \(Read-only file system\): name another folder"):
        run(config, out=disk / "run")


# ------------------------------------------------------------------------------------------------ damage


def damage(path: Path, how: str) -> None:
    file = path / "method.safetensors"
    if how == "bit":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "gone":
        file.unlink()
    elif how == "empty":
        shutil.rmtree(path)
        path.mkdir()
    elif how == "progress":
        text = (path / "progress.json").read_text().replace('"step": 6', '"step": 4')
        (path / "progress.json").write_text(text)
    elif how == "foreign":
        write_checkpoint(
            path.with_name("step-000000099"), {"method": {"a": torch.ones(2)}}, checkpoint.Progress(step=6)
        )
        shutil.copy(path.with_name("step-000000099") / "method.safetensors", file)
        shutil.rmtree(path.with_name("step-000000099"))


@pytest.mark.parametrize("how", ["bit", "cut", "gone", "empty", "progress", "foreign"])
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(how: str, tmp_path: Path, whole: Trainer) -> None:
    shutil.copytree(whole.out, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "step-000000006", how)
    resumed = start(tmp_path, seed=9)
    with pytest.warns(CheckpointWarning, match=r"step-000000006 cannot be read: .* Going on from step-000000004"):
        resumed.run(resume=True)
    assert_same(resumed, whole)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert names(tmp_path) == ["damaged-step-000000006", "step-000000004", "step-000000006"]
    assert read_checkpoint(tmp_path / "checkpoints" / "step-000000006")[1].step == 6


def test_with_one_checkpoint_kept_a_damaged_one_does_not_push_out_the_good(tmp_path: Path, whole: Trainer) -> None:
    shutil.copytree(whole.out, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "step-000000006", "bit")
    resumed = start(tmp_path, seed=9, keep_checkpoints=1)
    resumed.checkpoint_every = 1
    with pytest.warns(CheckpointWarning):
        resumed.run(resume=True)
    assert names(tmp_path) == ["damaged-step-000000006", "step-000000006"]
    assert_same(resumed, whole)


def test_when_all_checkpoints_are_damaged_the_run_does_not_begin_anew(tmp_path: Path, whole: Trainer) -> None:
    shutil.copytree(whole.out, tmp_path, dirs_exist_ok=True)
    for path in list_checkpoints(tmp_path / "checkpoints"):
        damage(path, "cut")
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* is whole .*restore one from a copy"):
        start(tmp_path, seed=9).run(resume=True)


# ------------------------------------------------------------------------------------------------ kills between writes


def test_files_and_folders_are_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename, fsync = Path.rename, os.fsync

    def note_rename(self: Path, target: Path) -> Path:
        done.append(f"rename {target.name}")
        return rename(self, target)

    def note_fsync(number: int) -> None:
        done.append(f"flush {Path(f'/proc/self/fd/{number}').readlink().name}")
        fsync(number)

    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(os, "fsync", note_fsync)
    write_checkpoint(tmp_path / "step-000000001", {"method": {"a": torch.ones(3)}}, checkpoint.Progress(step=1))
    assert sorted(done[:3]) == ["flush checksums.json", "flush method.safetensors", "flush progress.json"]
    assert done[3:] == ["flush .step-000000001.writing", "rename step-000000001", f"flush {tmp_path.name}"]


@pytest.mark.parametrize("at", range(2))
def test_a_kill_while_a_checkpoint_is_replaced_loses_neither(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step-000000001"
    write_checkpoint(path, {"method": {"a": torch.ones(3)}}, checkpoint.Progress(step=1))
    rename, calls = Path.rename, iter(range(9))

    def kill(self: Path, target: Path) -> Path:
        if next(calls) == at:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(path, {"method": {"a": torch.zeros(3)}}, checkpoint.Progress(step=1))
    checkpoint.restore_replaced(tmp_path)
    assert torch.equal(read_checkpoint(path)[0]["method"]["a"], torch.ones(3))


def test_a_kill_while_an_old_one_is_removed_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write_checkpoint(
            tmp_path / f"step-{step:09d}", {"method": {"a": torch.ones(3)}}, checkpoint.Progress(step=step)
        )

    def kill(path: Path) -> None:
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.remove_old(tmp_path, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000002"]
    checkpoint.put_in_order(tmp_path, checkpoint.Progress(step=2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]


def test_the_best_so_far_survives_being_set_back(tmp_path: Path) -> None:
    """The best of step 3 was replaced by that of step 5; the checkpoint of step 6 is damaged, that of step 4 is not."""
    scores = {3: 2.0, 5: 3.0}

    def options(running: list[Trainer]) -> dict[str, Any]:
        return {"evaluate_every": 1, "validate": lambda _: {"score": scores.get(running[0].progress.step, 1.0)}}

    ends = []
    for folder in ("whole", "damaged"):
        running: list[Trainer] = []
        running.append(start(tmp_path / folder, **options(running)))
        running[0].run()
        if folder == "damaged":
            damage(tmp_path / folder / "checkpoints" / "step-000000006", "cut")
            running[:] = [start(tmp_path / folder, seed=9, **options(running))]
            with pytest.warns(CheckpointWarning):
                running[0].run(resume=True)
        ends.append(running[0])
    assert ends[1].progress.best_step == ends[0].progress.best_step == 5
    best = [read_checkpoint(tmp_path / folder / "checkpoints" / "best-000000005")[0] for folder in ("whole", "damaged")]
    assert all(torch.equal(value, best[1]["student"][key]) for key, value in best[0]["student"].items())

"""What a launcher starts: one process speaks, and torchrun's restarts go on by themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState

from cmapkd.config import ConfigError
from cmapkd.training import processes
from cmapkd.training.checkpoint import list_checkpoints, read_checkpoint
from cmapkd.training.engine import WholeEngine
from helpers import make_trainer, read_lines

RECIPE = {
    "base": "scenes",
    "teacher": "tiny:scenes-teacher",
    "student": "tiny:debug",
    "method": "clip_kd",
    "data": {"train": "scenes?length=64", "val": None, "test": None},
    "training": {"batch_size": 16, "steps": 40, "device": "cpu", "log_every": 1, "checkpoint_every": 4, "ema": 0.9},
}


def command(recipe: Path, out: Path) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    return [*torchrun, "-m", "cmapkd", "distill", str(recipe), "--out", str(out)]


def worker_of(process: int) -> int:
    """One of the processes that torchrun started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == process and b"cmapkd" in (entry / "cmdline").read_bytes():
                    return int(entry.name)
            except OSError:  # it ended meanwhile
                continue
    raise AssertionError(f"{process} has no workers")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker to kill in /proc")
def test_a_killed_worker_is_started_again_and_the_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(command(recipe, tmp_path / "whole"), env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert whole.stdout.count("student and evidence:") == 1  # the first process speaks
    with (tmp_path / "output").open("w") as output:
        out = tmp_path / "killed"
        running = subprocess.Popen(command(recipe, out), env=environment, stdout=output, stderr=output)
        deadline = time.monotonic() + 900
        while not list_checkpoints(out / "checkpoints"):
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(worker_of(running.pid), signal.SIGKILL)
        assert running.wait(900) == 0, (tmp_path / "output").read_text()[-3000:]
    ends = [read_checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in (tmp_path / "whole", out)]
    for group, tensors in ends[0][0].items():
        assert all(torch.equal(ends[1][0][group][key], value) for key, value in tensors.items()), group
    assert ends[1][1].ledger == ends[0][1].ledger
    steps = [line["step"] for line in read_lines(out / "metrics.jsonl")]
    assert steps == [*range(1, 41)]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_speaks(rank: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cmapkd", "distill", "--help"],
        env={**os.environ, "RANK": rank},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("Train a student" in done.stdout) == (rank == "0")
    done = subprocess.run(
        [sys.executable, "-m", "cmapkd", "distill", "list", "oops", "--resume=yes"],
        env={**os.environ, "RANK": rank},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2


def test_errors_say_whose_they_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cmapkd", "distill", "contrastive_scenes"],
        env={**os.environ, "RANK": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error in process 3: name the run folder: --out DIR\n"


def test_restarts_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not processes.was_restarted()
    monkeypatch.setenv(processes.RESTARTS, "0")
    assert not processes.was_restarted()
    monkeypatch.setenv(processes.RESTARTS, "2")
    assert processes.was_restarted()


def test_waiting_alone_takes_no_time() -> None:
    PartialState(cpu=True)
    processes.wait_for_all()


def test_accelerates_own_sharding_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"training\.sharding=fsdp2"):
        make_trainer(tmp_path)


def test_one_process_has_nothing_to_share_out(tmp_path: Path) -> None:
    alone, plain = make_trainer(tmp_path / "a", sharding="fsdp2"), make_trainer(tmp_path / "b")
    assert isinstance(alone.engine, WholeEngine)
    alone.run()
    plain.run()
    assert all(torch.equal(value, plain.method.state_dict()[key]) for key, value in alone.method.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_teacher": True}, "needs sharding: fsdp2"),
        ({"sharding": "fsdp2", "compile": True}, "do not go together"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)

"""Processes that are killed, hang, or run out of memory."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sixty_steps import of_sixty_steps

from cmapkd.config import RunStopped
from cmapkd.data.check import TooManyBadSamples
from cmapkd.data.loading import make_loader
from cmapkd.data.open import open_source
from cmapkd.data.plans import PlanSampler
from cmapkd.data.workers import MAX_DEATHS, ReadAhead, ReadTimeout, WorkerDied, WorkerWarning
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.run import evaluate
from cmapkd.training import OutOfMemory, Trainer
from cmapkd.training.checkpoint import list_checkpoints
from cmapkd.training.memory import is_out_of_memory
from helpers import DropoutStudent, MemorySource, make_builder, make_method, make_model, make_trainer, read_lines
from started import Script, begun

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a single core
]


class Numbers(torch.utils.data.Dataset[tuple[int, int]]):
    """Number and the process that made it; at some of them, as `marks` says once, something happens to that process."""

    def __init__(self, folder: Path, fatal: dict[int, str], *, again: bool = False) -> None:
        self.folder, self.fatal, self.again = folder, fatal, again

    def __getitem__(self, number: int) -> tuple[int, int]:
        mark = self.folder / str(number)
        if number in self.fatal and (self.again or not mark.exists()):
            mark.touch()
            if self.fatal[number] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fatal[number] == "exit":
                os._exit(3)
            if self.fatal[number] == "hang":
                time.sleep(3600)
            if self.fatal[number] == "pause":
                until = time.monotonic() + 3.3  # after the pause: nothing is there yet when the process goes on
                _pause(int((self.folder / "main").read_text()), seconds=3.0)
                time.sleep(max(0.0, until - time.monotonic()))
                return number, os.getpid()
            raise ValueError("an error of its own")
        return number, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fatal", [{5: "kill"}, {0: "kill", 7: "exit"}, {11: "kill"}])
def test_killed_workers_are_replaced_and_nothing_is_lost(workers: int, fatal: dict[int, str], tmp_path: Path) -> None:
    ahead = ReadAhead(Numbers(tmp_path, fatal), range(12), workers=workers)
    with pytest.warns(WorkerWarning, match=r"a data worker died \(.*(SIGKILL|exit code 3)\) while reading"):
        found = list(ahead)
    assert [number for number, _ in found] == list(range(12))


def test_workers_that_die_again_and_again_end_the_run_in_words(tmp_path: Path) -> None:
    ahead = ReadAhead(Numbers(tmp_path, {2: "kill"}, again=True), range(5), workers=1)
    found = []
    with (
        pytest.warns(WorkerWarning),
        pytest.raises(
            WorkerDied,
            match=rf"died {MAX_DEATHS + 1} times, the last by signal SIGKILL while reading [012] or .*lower data.w",
        ),
    ):
        for number, _ in ahead:
            found.append(number)
    assert found in ([], [0], [0, 1])  # a worker that is killed takes along what it had not handed over yet


def test_an_error_of_a_worker_is_not_taken_for_its_death(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an error of its own"):
        list(ReadAhead(Numbers(tmp_path, {1: "raise"}), range(3), workers=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hanging_read_ends_in_time_and_leaves_no_process(workers: int, tmp_path: Path) -> None:
    ahead = ReadAhead(
        Numbers(tmp_path, {3: "hang"}), range(9), workers=workers, timeout=1.0, name=lambda n: f"file {n}"
    )
    begun, seen = time.monotonic(), []
    with pytest.raises(ReadTimeout, match=r"for 1 seconds while reading file 3: .*raise data.timeout"):
        for number, process in ahead:
            seen.append((number, process))
    assert [number for number, _ in seen] == [0, 1, 2]
    assert time.monotonic() - begun < 20
    time.sleep(0.1)
    assert not [process for _, process in seen if process != os.getpid() and _lives(process)]


def _pause(process: int, *, seconds: float) -> None:
    """Stops a process as Ctrl-Z does, and lets it go on later."""
    subprocess.run(["sh", "-c", f"(kill -STOP {process}; sleep {seconds}; kill -CONT {process}) &"], check=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_paused_process_has_not_waited(workers: int, tmp_path: Path) -> None:
    (tmp_path / "main").write_text(str(os.getpid()))
    ahead = ReadAhead(Numbers(tmp_path, {3: "pause"}), range(9), workers=workers, timeout=2.0)
    begun = time.monotonic()
    assert [number for number, _ in ahead] == list(range(9))
    assert time.monotonic() - begun > 3.0


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Slow(MemorySource):
    """Reading sample 5 does not end."""

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            time.sleep(3600)
        return super().__getitem__(index)


def test_a_hanging_read_stops_training_with_the_step_named(tmp_path: Path) -> None:
    running = make_trainer(tmp_path, source=Slow(), steps=3)
    running.load = partial(running.load, timeout=1.0)
    with pytest.raises(ReadTimeout, match=r"while reading the batch of step [123], samples .*5"):
        running.run()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_hanging_read_stops_an_evaluation(workers: int) -> None:
    settings = {"tasks": ["retrieval"], "batch_size": 4, "workers": workers, "timeout": 1}
    with pytest.raises(ReadTimeout, match=r"while reading samples 4 to 7 of memory: .* evaluation.timeout"):
        evaluate(make_model(), Slow(), EvaluationConfig.from_mapping(settings), device="cpu")


class Deadly(MemorySource):
    """The process that first reads sample 7 is killed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(24, bad=(3,))
        self.folder = folder

    def __getitem__(self, index: int) -> Any:
        if index == 7 and not (self.folder / "dead").exists():
            (self.folder / "dead").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_run_whose_worker_is_killed_ends_as_one_whose_is_not(tmp_path: Path) -> None:
    ends = []
    for name, source in (("whole", MemorySource(24, bad=(3,))), ("killed", Deadly(tmp_path))):
        method = make_method("contrastive", student=make_model(kind=DropoutStudent))
        made = make_trainer(tmp_path / name, method, source=source, steps=6, workers=2)
        torch.manual_seed(0)
        if name == "whole":
            made.run()
        else:
            with pytest.warns(WorkerWarning, match="while reading the batch of step"):
                made.run()
        ends.append(made)
    one, other = ends
    assert all(torch.equal(value, other.method.state_dict()[key]) for key, value in one.method.state_dict().items())
    assert one.ledger.state_dict() == other.ledger.state_dict()


def test_a_worker_that_dies_during_a_step_does_not_interrupt_it() -> None:
    """torch's own handler raises in the training process wherever it happens to be."""
    builder = make_builder(make_method("contrastive"))
    sampler = PlanSampler(24, batch_size=8, seed=0, start=0, stop=40)
    batches = make_loader(builder, sampler, workers=1, pin_memory=False)
    ids = [next(batches).ids]
    import multiprocessing

    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    total = sum(number for number in range(3_000_000))  # a step: the death comes within it, and must not show here
    assert total > 0
    with pytest.warns(WorkerWarning):
        ids += [batch.ids for batch in batches]
    assert ids == [builder[plan].ids for plan in sampler]


# ------------------------------------------------------------------------------------------------ signals


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    made = of_sixty_steps(tmp_path_factory.mktemp("whole"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a single core
        made.run()
    return made


def wait_for(out: Path, lines: int, process: Script) -> None:
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and process.lives:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= lines:
            return
        time.sleep(0.002)


def workers_of(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_to_the_whole_group_loses_nothing(number: signal.Signals, tmp_path: Path, whole: Trainer) -> None:
    """Slurm, `timeout` and shells tell every process of a job. SIGTERM has the step finished and saved."""
    with begun(Path(__file__).with_name("sixty_steps.py"), str(tmp_path), timeout=500) as process:
        wait_for(tmp_path, 17, process)
        workers = workers_of(process.pid)
        os.killpg(process.pid, number)
        done = process.end()
    errors = done.stderr
    assert done.returncode == (1 if number == signal.SIGTERM else -number), errors
    steps = len([line for line in (tmp_path / "metrics.jsonl").read_text().split("\n") if line.endswith("}")])
    last = int(list_checkpoints(tmp_path / "checkpoints")[-1].name.rpartition("-")[2])
    if number == signal.SIGTERM:
        assert "Interrupted: stopped after step" in errors
        assert last == steps
    else:
        assert last in (steps // 7 * 7, (steps - 1) // 7 * 7)
    deadline = time.monotonic() + 60  # workers without a parent look for it every five seconds
    while any(map(_lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [worker for worker in workers if _lives(worker)]
    resumed = of_sixty_steps(tmp_path, seed=9)
    resumed.run(resume=True)
    state = resumed.method.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.method.state_dict().items())
    assert [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")] == [
        line["loss"] for line in read_lines(whole.out / "metrics.jsonl")
    ]


# ------------------------------------------------------------------------------------------------ data that goes


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    import io
    import tarfile

    folder = tmp_path / "shards"
    folder.mkdir()
    source = MemorySource(64)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for index in range(32 * shard, 32 * shard + 32):
                sample = source[index]
                file = io.BytesIO()
                sample.image.save(file, "PNG")
                for name, data in ((f"{index}.png", file.getvalue()), (f"{index}.txt", sample.captions[0].encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("how", ["gone", "cut", "replaced"])
def test_a_shard_that_disappears_on_the_way(how: str, shards: Path, tmp_path: Path) -> None:
    source = open_source(f"webdataset:{shards}/*.tar")
    shard = shards / "1.tar"
    if how == "gone":
        shard.unlink()
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:5000])
    else:
        shard.write_bytes(shard.read_bytes())
        os.utime(shard, (1, 1))
    counted = make_trainer(tmp_path / "all", source=source, steps=8, max_bad_share=1.0)
    counted.run()
    assert counted.ledger.num_bad > 0
    assert {each for each, _ in counted.ledger.bad} <= {f"1/{index}" for index in range(32, 64)}
    said = {"gone": r"No such file or directory \(1.tar\)", "cut": "changed", "replaced": "changed"}[how]
    stopped = make_trainer(tmp_path / "few", source=source, steps=40, max_bad_share=0.01)
    with pytest.raises(TooManyBadSamples, match=rf"failed, more than max_bad_share 1 %.*{said}"):
        stopped.run()


# ------------------------------------------------------------------------------------------------ memory and numbers


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        ),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_memory_that_runs_out_becomes_advice(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = make_trainer(tmp_path, "clip_kd", steps=4, checkpoint_every=1, workers=0)
    step = Trainer._step

    def fail(self: Trainer, batch: Any) -> Any:
        if self.progress.step == 2:
            raise error
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_step", fail)
    with pytest.raises(OutOfMemory, match="memory ran out at step 3") as stopped:
        running.run()
    message = str(stopped.value)
    for advice in (
        "training.micro_batch=2 (now none)",
        "cache=auto",
        "training.precision=bf16",
        "(now 8)",
        "resume the run",
    ):
        assert advice in message
    assert isinstance(stopped.value, RunStopped)
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step-000000002"


def test_advice_leaves_out_what_is_already_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = make_trainer(tmp_path, "contrastive", steps=1, micro_batch=4, precision="bf16")
    monkeypatch.setattr(Trainer, "_step", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(OutOfMemory) as stopped:
        running.run()
    message = str(stopped.value)
    assert "training.micro_batch=1 (now 4)" in message
    assert "cache=auto" not in message
    assert "precision" not in message


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.float32)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))

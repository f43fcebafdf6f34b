"""An interrupted run ends bit for bit where the uninterrupted one does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.data.ordering import Ordering
from cmapkd.models import DualEncoder
from cmapkd.training import Interrupted, Trainer, checkpoint, stopping, trainer
from cmapkd.training.checkpoint import list_checkpoints, optimizer_tensors, read_checkpoint, write_checkpoint
from contracted import Contracted
from helpers import (
    CLASSIFYING,
    DUAL,
    DropoutStudent,
    MemorySource,
    Sharded,
    make_method,
    make_model,
    make_student,
    make_trainer,
    read_lines,
)

STEPS = 7  # of three steps an epoch, so that epochs end on the way


class StopAfter(threading.Event):
    """Asked to stop once the trainer has done so many steps."""

    def __init__(self, running: Trainer, step: int) -> None:
        super().__init__()
        self.running, self.step = running, step

    def is_set(self) -> bool:
        return self.running.progress.step >= self.step


def interrupt(running: Trainer, step: int, monkeypatch: pytest.MonkeyPatch, *, resume: bool = False) -> Path:
    """Runs, or goes on, until the signal comes; returns the checkpoint."""

    @contextmanager
    def signals() -> Iterator[threading.Event]:
        yield StopAfter(running, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "signals", signals)
        with pytest.raises(Interrupted, match=f"stopped after step {step}") as stopped:
            running.run(resume=resume)
    return stopped.value.checkpoint


def rows(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the only number that is a measurement of the machine."""
    lines = read_lines(out / "metrics.jsonl")
    assert all(line.pop("pairs_per_second", 1.0) > 0 for line in lines)
    return lines


def everything(done: Trainer) -> dict[str, torch.Tensor]:
    tensors = {f"method.{key}": value for key, value in done.method.state_dict().items()}
    tensors |= {f"optimizer.{key}": value for key, value in optimizer_tensors(done.engine.optimizer).items()}
    tensors |= {f"student.{key}": value for key, value in done.student.state_dict().items()}
    return {key: value.clone() for key, value in tensors.items()}


def assert_same_end(one: Trainer, other: Trainer) -> None:
    mine, theirs = everything(one), everything(other)
    assert mine.keys() == theirs.keys()
    different = [key for key in mine if not torch.equal(mine[key], theirs[key])]
    assert not different
    assert rows(one.out) == rows(other.out)
    assert one.ledger.state_dict() == other.ledger.state_dict()


def score(student: DualEncoder) -> dict[str, float]:
    """Some number of the weights."""
    return {"score": float(sum(parameter.detach().abs().sum() for parameter in student.parameters()))}


WINDOWS, IN_SHARDS = Ordering("window", 4, 2), Sharded((9, 14, 3, 11, 0, 13, 6), bad=(3, 30), without_caption=(17,))
# name: (method, student class, options of the trainer, steps after which it is interrupted, one after the other)
CASES: dict[str, tuple[Any, Any, dict[str, Any], tuple[int, ...]]] = {
    **{f"contrastive, {first}": ("contrastive", None, {}, (first, first + 3)) for first in (1, 2, 3)},
    "averaged": ("contrastive", None, {"ema": 0.8}, (1, 4)),
    "dropout": ("contrastive", DropoutStudent, {}, (2, 5)),
    "bf16": ("contrastive", None, {"precision": "bf16"}, (3,)),
    "workers": ("contrastive", DropoutStudent, {"workers": 2}, (2,)),
    "validated": ("contrastive", DropoutStudent, {"evaluate_every": 2, "validate": score}, (2, 3)),
    "few lines": ("contrastive", None, {"log_every": 3}, (2, 4)),
    "bad samples": ("contrastive", None, {"source": MemorySource(24, bad=(3, 11), without_caption=(5,))}, (2, 4)),
    "windows": ("contrastive", None, {"source": IN_SHARDS, "ordering": WINDOWS}, (1, 4)),  # within windows of 10 steps
    "windows, workers": ("contrastive", None, {"source": IN_SHARDS, "ordering": WINDOWS, "workers": 2}, (5,)),
    "distilled": ("clip_kd", None, {}, (1, 3, 5)),
    "micro-batches": ("clip_kd", DropoutStudent, {"micro_batch": 3}, (1, 4)),
    "levels in micro-batches": ("cmapkd", DropoutStudent, {"micro_batch": 3, "precision": "bf16", "ema": 0.5}, (3,)),
    "contracted": (Contracted, DropoutStudent, {"ema": 0.5, "micro_batch": 3}, (2, 4)),
    "everything": ("clip_kd", DropoutStudent, {"ema": 0.5, "workers": 1, "precision": "bf16"}, (4,)),
    **{f"method {name}": (name, None, {}, (4,)) for name in (*DUAL, *CLASSIFYING)},
}


def start(name: str, out: Path, *, seed: int = 0) -> Trainer:
    method, kind, options, _ = CASES[name]
    student = make_student(method, seed=seed, **({"kind": kind} if kind else {}))
    made = make_trainer(out, make_method(method, student=student), steps=STEPS, **options)
    torch.manual_seed(seed)
    return made


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
@pytest.mark.parametrize("name", CASES)
def test_resume_is_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = start(name, tmp_path / "whole")
    whole.run()
    first, *later = CASES[name][3]
    interrupt(start(name, tmp_path / "cut"), first, monkeypatch)
    for step in later:
        # other weights and another random state, both to be replaced
        interrupt(start(name, tmp_path / "cut", seed=90 + step), step, monkeypatch, resume=True)
    resumed = start(name, tmp_path / "cut", seed=99)
    resumed.run(resume=True)
    assert resumed.progress.step == STEPS
    assert_same_end(resumed, whole)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = start("dropout", tmp_path / "whole")
    whole.run()
    killed = make_trainer(
        tmp_path / "killed",
        make_method("contrastive", student=make_model(kind=DropoutStudent)),
        steps=STEPS,
        checkpoint_every=2,
    )
    step = Trainer._step

    def die(self: Trainer, batch: Any) -> Any:
        if self.progress.step == 5:
            raise RuntimeError("power cut")
        return step(self, batch)

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", die)
        with pytest.raises(RuntimeError, match="power cut"):
            killed.run()
    assert [line["step"] for line in read_lines(killed.out / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    with (killed.out / "metrics.jsonl").open("a") as file:  # what a kill in the middle of a write leaves
        file.write('{"step": 6, "lo')
    resumed = start("dropout", tmp_path / "killed", seed=99)
    resumed.run(resume=True)
    assert_same_end(resumed, whole)


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    whole, other = start("contrastive, 1", tmp_path / "a"), start("contrastive, 1", tmp_path / "b")
    whole.run()
    (other.out / "metrics.jsonl").write_text('{"step": 1, "loss": 0}\n')
    other.run(resume=True)
    assert_same_end(other, whole)


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    whole = start("averaged", tmp_path / "a")
    whole.run()
    again = start("averaged", tmp_path / "a", seed=9)
    again.run(resume=True)
    assert_same_end(again, whole)


def test_checkpoint_beyond_the_end_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=4).run()
    with pytest.raises(ValueError, match="at step 4, beyond this run's 3"):
        make_trainer(tmp_path, steps=3).run(resume=True)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("name", ["clip_kd", "c2kd"])
def test_no_tensor_of_a_teacher_is_in_a_checkpoint(name: str, tmp_path: Path) -> None:
    done = make_trainer(tmp_path, name, steps=3, checkpoint_every=3, ema=0.9)
    done.run()
    assert done.method.teacher is not None
    of_teacher = [
        value for value in done.method.teacher.model.state_dict().values() if value.numel() > 1 and value.std() > 0
    ]
    tensors, _ = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    stored = {f"{part}/{key}": value for part, values in tensors.items() for key, value in values.items()}
    found = [
        key
        for key, value in stored.items()
        if any(value.shape == other.shape and torch.equal(value.float(), other.float()) for other in of_teacher)
    ]
    assert not found


def test_checkpoint_holds_tensors_and_json_and_no_teacher(tmp_path: Path) -> None:
    done = make_trainer(tmp_path, "clip_kd", steps=3, checkpoint_every=1, ema=0.9)
    done.run()
    (last, before) = reversed(list_checkpoints(tmp_path / "checkpoints"))  # of three steps, two are kept
    assert before.name == "step-000000002"
    assert sorted(file.name for file in last.iterdir()) == [
        "average.safetensors",
        "checksums.json",
        "method.safetensors",
        "optimizer.safetensors",
        "progress.json",
        "random-0.safetensors",
    ]
    tensors, progress = read_checkpoint(last)
    assert progress.step == 3
    assert progress.seconds > 0
    assert tensors["method"].keys() == done.method.state_dict().keys()
    assert done.method.teacher is not None
    teachers = [
        value for value in done.method.teacher.model.state_dict().values() if value.numel() > 1 and value.std() > 0
    ]
    stored = [value for group in ("method", "average") for value in tensors[group].values()]
    assert not any(one.shape == other.shape and torch.equal(one, other) for one in teachers for other in stored)


def test_a_kill_before_the_rename_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_rename(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    running = start("contrastive, 1", tmp_path)
    interrupt(running, 2, monkeypatch)
    (kept,) = list_checkpoints(tmp_path / "checkpoints")[-1:]
    stopped = start("contrastive, 1", tmp_path, seed=9)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", no_rename)
        with pytest.raises(KeyboardInterrupt):
            stopped.run(resume=True)
    assert list_checkpoints(tmp_path / "checkpoints")[-1] == kept
    assert read_checkpoint(kept)[1].step == 2
    resumed = start("contrastive, 1", tmp_path, seed=9)
    resumed.run(resume=True)
    whole = start("contrastive, 1", tmp_path / "whole")
    whole.run()
    assert_same_end(resumed, whole)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_kill_while_the_best_is_replaced_leaves_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 2.0])
    running = make_trainer(
        tmp_path, steps=4, evaluate_every=2, checkpoint_every=2, validate=lambda _: {"score": next(scores)}
    )
    write = checkpoint.write_checkpoint

    def die(path: Path, *arguments: Any) -> None:
        if path.name == "best-000000004":
            raise KeyboardInterrupt
        write(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        running.run()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints", "best")] == ["best-000000002"]
    assert read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])[1].best_step == 2


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step-000000001", {"method": {"a": torch.ones(3)}}, checkpoint.Progress(step=1))
    tensors, progress = read_checkpoint(tmp_path / "step-000000001")
    assert torch.equal(tensors["method"]["a"], torch.ones(3))
    assert progress == checkpoint.Progress(step=1)
    (tmp_path / "step-000000001" / "method.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"step-000000001 cannot be read: method.safetensors is damaged"):
        read_checkpoint(tmp_path / "step-000000001")
    write_checkpoint(tmp_path / "step-000000001", {"method": {"a": torch.ones(3)}}, checkpoint.Progress(step=1))
    (tmp_path / "step-000000001" / "progress.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: .*No such file.*progress"):
        read_checkpoint(tmp_path / "step-000000001")


def test_unfinished_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-000000002", "step-000000010", ".step-000000011.writing", "step-x", "best-000000002"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000002", "step-000000010"]
    assert list_checkpoints(tmp_path / "nothing") == []


def test_random_state_is_restored_whole() -> None:
    import random

    random.gauss(0, 1)  # leaves a second number for the next call
    state = checkpoint.random_tensors()
    first = (random.gauss(0, 1), random.random(), torch.rand(3))
    checkpoint.load_random(state)
    second = (random.gauss(0, 1), random.random(), torch.rand(3))
    assert first[:2] == second[:2]
    assert torch.equal(first[2], second[2])


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_a_second_one_does_not(number: int) -> None:
    before = signal.getsignal(number)
    with stopping.signals() as asked:
        signal.raise_signal(number)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_outside_the_main_thread_no_handler_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with stopping.signals() as asked:
            seen.append((asked.is_set(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]

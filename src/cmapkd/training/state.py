"""A run's state on disk: what every process brings to a checkpoint, and how each gets it back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from cmapkd.config import writing
from cmapkd.data.check import SampleLedger
from cmapkd.data.random import key_of
from cmapkd.models import Model
from cmapkd.training import checkpoint as checkpoints
from cmapkd.training.background import Background, HostCopies
from cmapkd.training.checkpoint import KINDS, Progress
from cmapkd.training.processes import wait_for_all

Tensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training reports at its end, or at a checkpoint."""

    student: Model  # the averaged one if the run keeps an average
    steps: int
    total: int  # steps that the run is to have
    seconds: float
    parts: dict[str, float]  # of these, see `Progress`
    best_step: int | None
    best_score: float | None
    extended: list[dict[str, int]]  # see `Progress`
    ledger: SampleLedger
    peak_memory: int  # bytes, of this process since it began or went on


class RunState:
    """Saves and restores one run's checkpoints, in one process or several.

    Args:
        folder: of the checkpoints.
        keep: how many of the newest stay.
        seed: of the run.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, *, keep: int, seed: int) -> None:
        self.folder, self.accelerator, self.keep, self.seed = folder, accelerator, keep, seed
        self.background, self.copies = Background(), {kind: HostCopies() for kind in KINDS}

    def save(self, learned: Tensors, progress: Progress) -> None:
        """Copies a checkpoint, which a thread then writes, once the last one is written. Every process must call it,
        since each has random state of its own (dropout).

        Raises:
            DiskError: an earlier one could not be written.
        """
        states = gather_object([checkpoints.random_tensors()])
        if self.accelerator.is_main_process:
            tensors = learned | {f"random-{rank}": state for rank, state in enumerate(states)}
            self._write("step", tensors, progress, keep=self.keep)

    def save_best(self, student: dict[str, Tensor], progress: Progress) -> None:
        """Likewise the student that validated best; for the first process alone."""
        self._write("best", {"student": student}, progress, keep=1)

    def finish(self) -> None:
        """Returns when everything is written, in every process.

        Raises:
            DiskError: something could not be.
        """
        self.background.wait()
        wait_for_all()

    def _write(self, kind: checkpoints.Kind, tensors: Tensors, progress: Progress, *, keep: int) -> None:
        self.background.wait(kind)
        path, copied = checkpoints.checkpoint_path(self.folder, progress.step, kind), self.copies[kind].of(tensors)
        told = copy.deepcopy(progress)

        def write() -> None:
            checkpoints.write_checkpoint(path, copied, told)
            checkpoints.remove_old(self.folder, keep=keep, kind=kind)

        self.background.start(kind, write)

    def load(self, total: int, put_back: Callable[[Tensors, Progress], None]) -> Progress | None:
        """Restores the newest checkpoint that is whole; None where there is none.

        The random state is not set here, see `continue_random`: what is built later must not draw from it.

        Args:
            total: steps of the run, beyond which no checkpoint may be.
            put_back: gives method, optimizer and average their tensors.
        """
        with self.accelerator.main_process_first():
            if self.accelerator.is_main_process:
                checkpoints.restore_replaced(self.folder)
            found = checkpoints.read_latest(self.folder)
            if found is None:
                return None
            tensors, progress = found
            if progress.step > total:
                newest = checkpoints.checkpoint_path(self.folder, progress.step)
                raise ValueError(f"{newest} is at step {progress.step}, beyond this run's {total}")
            if self.accelerator.is_main_process:
                with writing(self.folder):
                    checkpoints.put_in_order(self.folder, progress)
        checkpoints.find_best(self.folder, progress)
        put_back(tensors, progress)
        self._random = tensors.get(f"random-{self.accelerator.process_index}")
        return progress

    _random: dict[str, Tensor] | None = None

    def continue_random(self, start: int) -> None:
        """Sets this process's own random state, from which dropout alone draws; losses draw by the step.

        Each process but the first has masks of its own, a pure function of (seed, rank, first step). A process that the
        checkpoint knows goes on where it stopped.
        """
        rank = self.accelerator.process_index
        if self._random is not None:
            checkpoints.load_random(self._random)
        elif rank:
            torch.manual_seed(key_of("process", self.seed, rank, start) % 2**63)

    def ledger_of_all(self, own: SampleLedger) -> SampleLedger:
        """The counts of all processes together; every process must ask for it."""
        if self.accelerator.num_processes == 1:
            return own
        total = SampleLedger()
        for state in gather_object([own.state_dict()]):
            total.merge(state)
        return total

"""A run's state on disk: what every process brings to a checkpoint, and how each gets it back."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from cmapkd.config import writing
from cmapkd.config.disk import flush
from cmapkd.data.check import SampleLedger
from cmapkd.data.random import key_of
from cmapkd.models import Model
from cmapkd.training import checkpoint as checkpoints
from cmapkd.training.background import Background, HostCopies
from cmapkd.training.checkpoint import KINDS, Progress
from cmapkd.training.config import TrainConfig
from cmapkd.training.processes import patient_group, wait_for_all
from cmapkd.training.shards import own_part, together, write_share

Tensors = dict[str, dict[str, Tensor]]
_WRITING = timedelta(hours=2)  # in which every process writes its share


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
        config: how many of the newest stay, and in which form they are written.
        seed: of the run.

    Attributes:
        shared: whether every process writes its share of a checkpoint.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, config: TrainConfig, *, seed: int) -> None:
        self.folder, self.accelerator, self.seed = folder, accelerator, seed
        self.keep, self.shared = max(1, config.keep_checkpoints), config.writes_shares(accelerator.num_processes)
        self.background, self.copies = Background(), {kind: HostCopies() for kind in KINDS}
        # of the writing threads alone: messages of the steps must not come between theirs
        self._writers = dist.new_group(backend="gloo", timeout=_WRITING) if self.shared else None

    def save(self, learned: Tensors, progress: Progress) -> None:
        """Copies a checkpoint, which a thread then writes, once the last one is written. Every process must call it,
        since each has random state of its own (dropout).

        Args:
            learned: whole tensors; where checkpoints are written in shares, those of this process.
        Raises:
            DiskError: an earlier one could not be written.
        """
        states = {f"random-{rank}": state for rank, state in enumerate(gather_object([checkpoints.random_tensors()]))}
        if self._writers is not None:
            self._write_shares(learned, states, progress)
        elif self.accelerator.is_main_process:
            self._write("step", learned | states, progress, keep=self.keep)

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

    def _write_shares(self, learned: Tensors, states: Tensors, progress: Progress) -> None:
        """Every process writes its rows; the first one also the states, and gives the folder its name."""
        self.background.wait("step")
        main, group = self.accelerator.is_main_process, self._writers
        path = checkpoints.checkpoint_path(self.folder, progress.step)
        part, places = own_part(learned, main=main)
        copied, told = self.copies["step"].of({"": part})[""], copy.deepcopy(progress)
        folder = checkpoints.begun(path)

        def begin() -> None:
            checkpoints.write_groups(checkpoints.begin(path), states)

        def share() -> dict[str, str]:
            files = write_share(folder, copied, places, self.accelerator.process_index)
            files += [folder / f"{name}.safetensors" for name in states] if main else []
            for file in files:
                flush(file)
            return {file.name: checkpoints.checksum(file) for file in files}

        def end(checksums: dict[str, str]) -> None:
            checkpoints.complete(path, told, checksums)
            checkpoints.remove_old(self.folder, keep=self.keep)

        def write() -> None:
            with writing(self.folder):
                try:
                    together(begin if main else None, group)
                    checksums = {name: value for each in together(share, group) for name, value in each.items()}
                    together(partial(end, checksums) if main else None, group)
                except BaseException:
                    if main:
                        shutil.rmtree(folder, ignore_errors=True)
                    raise

        self.background.start("step", write, awaited=True)

    def load(self, total: int, put_back: Callable[[Path, Progress], None]) -> Progress | None:
        """Restores the newest checkpoint that is whole; None where there is none.

        The random state is not set here, see `continue_random`: what is built later must not draw from it.

        Args:
            total: steps of the run, beyond which no checkpoint may be.
            put_back: gives method, optimizer and average their tensors, of this checkpoint.
        """
        main = self.accelerator.is_main_process
        if main:
            checkpoints.restore_replaced(self.folder)
        wait_for_all()
        path = checkpoints.newest_whole(self.folder, self._listed(), self._damage, tell=main)
        if path is None:
            return None
        progress = checkpoints.progress_of(path)
        if progress.step > total:
            raise ValueError(f"{path} is at step {progress.step}, beyond this run's {total}")
        wait_for_all()  # every process has looked
        if main:
            with writing(self.folder):
                checkpoints.put_in_order(self.folder, progress)
        wait_for_all()
        checkpoints.find_best(self.folder, progress)
        put_back(path, progress)
        self._random = checkpoints.read_group(path, f"random-{self.accelerator.process_index}")
        return progress

    def kept(self) -> list[Path]:
        """The checkpoints, oldest first, with the one that is being written; for the message of a run that ends."""
        with suppress(Exception):  # what the disk says does not count here
            self.background.wait()
        return checkpoints.list_checkpoints(self.folder)

    def _listed(self) -> list[Path]:
        """The checkpoints that the first process sees: all processes decide about the same ones."""
        found = checkpoints.list_checkpoints(self.folder)
        if (group := patient_group()) is None:
            return found
        names = together(lambda: [path.name for path in found], group)[0]
        return [self.folder / name for name in names]

    def _damage(self, path: Path) -> str | None:
        """Of the files of a checkpoint each process reads some, and all learn what one finds."""
        if (group := patient_group()) is None:
            return checkpoints.damage(path)
        rank, number = self.accelerator.process_index, self.accelerator.num_processes
        found = together(partial(checkpoints.damage, path, part=slice(rank, None, number)), group)
        return next((reason for reason in found if reason is not None), None)

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

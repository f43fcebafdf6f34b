"""The one loop: steps any method's student, logs, validates, checkpoints, and resumes exactly where it stopped."""

from __future__ import annotations

import signal
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from rich.console import Console
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cmapkd.data.batches import Batches, PlanSampler, make_loader
from cmapkd.data.check import SampleLedger
from cmapkd.data.types import Batch
from cmapkd.methods import Method, Term
from cmapkd.methods.stages import WHOLE, StageConfig, stage_ends
from cmapkd.models import DualEncoder
from cmapkd.training import checkpoint as checkpoints
from cmapkd.training.config import OptimConfig, TrainConfig
from cmapkd.training.optim import learning_rate, make_optimizer, set_learning_rate
from cmapkd.training.progress import TrainingDisplay
from cmapkd.training.trackers import Tracker, make_trackers

Validate = Callable[[DualEncoder], dict[str, float]]  # student -> numbers; `score` among them is what "best" means


class Interrupted(Exception):
    """The run was stopped by a signal after saving a checkpoint."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; saved {checkpoint.name}")
        self.step = step
        self.checkpoint = checkpoint


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite. Names the step, the terms and the samples; checkpoints are from before it."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished training reports."""

    student: DualEncoder  # the averaged one if the run keeps an average
    steps: int
    seconds: float
    best_step: int | None
    best_score: float | None
    ledger: SampleLedger


class Trainer:
    """Trains `method` on `builder`'s batches and leaves checkpoints and metrics in `out`.

    Args:
        builder: makes the batches; its source's length decides what an epoch is.
        validate: measures the student every `evaluate_every` steps; its `score` picks the best checkpoint.
        settings: the resolved config, handed to trackers that show it.
        max_bad_share: share of unreadable samples above which the run stops.
    """

    def __init__(
        self,
        method: Method,
        builder: Batches,
        config: TrainConfig,
        optim: OptimConfig,
        *,
        out: Path,
        seed: int,
        workers: int = 0,
        max_bad_share: float = 0.01,
        validate: Validate | None = None,
        settings: dict[str, Any] | None = None,
        console: Console | None = None,
        title: str = "train",
    ) -> None:
        self.config, self.optim, self.out, self.seed, self.workers = config, optim, out, seed, workers
        self.builder, self.validate, self.settings, self.title = builder, validate, settings or {}, title
        self.max_bad_share = max_bad_share
        self.accelerator = Accelerator(
            mixed_precision="no",  # the loop's own autocast does it: accelerate's holds for the whole process
            cpu=config.on_cpu,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.console = console if self.accelerator.is_main_process else None
        self.method = method
        method.micro_batch = config.micro_batch
        for teacher in method.teachers.values():
            teacher.to(self.accelerator.device)
        self._prepare()
        self.sampler = PlanSampler(
            len(builder.source),
            batch_size=config.batch_size,
            seed=seed,
            start=0,
            stop=0,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self.total = config.num_steps(self.sampler.steps_per_epoch)
        per_epoch = self.sampler.steps_per_epoch
        self.stages: tuple[StageConfig, ...] = config.stages or method.default_stages or (WHOLE,)
        self.ends = stage_ends(self.stages, total=self.total, steps_per_epoch=per_epoch)
        method.check_stages(self.stages)  # a wrong name shows now, not when its stage begins
        self.stage = WHOLE
        self.checkpoint_every = config.checkpoint_every or max(1, self.total // 10)
        self.progress = checkpoints.Progress()
        self.ledger = SampleLedger()

    @property
    def checkpoint_folder(self) -> Path:
        return self.out / "checkpoints"

    def _prepare(self) -> None:
        """Wraps the method as it is, and gives it an optimizer and an average."""
        method, config = self.method, self.config
        if config.compile:
            method.student.compile()  # in place: names of weights, checkpoints and the saved student stay as they are
        self.wrapped, self.optimizer = self.accelerator.prepare(method, make_optimizer(method, self.optim))
        self.average = (
            AveragedModel(method.student, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
            if config.ema is not None
            else None
        )

    def _changed(self, change: Callable[[], None]) -> bool:
        """Lets the method change; where it has other parameters then, wrapper, optimizer and average begin anew."""
        before = [*self.method.parameters()]
        change()
        if [id(parameter) for parameter in before] == [id(parameter) for parameter in self.method.parameters()]:
            return False
        self.wrapped = self.optimizer = self.average = None
        self.accelerator.free_memory()  # an old wrapper would go on to exchange gradients
        self._prepare()
        self.wrapped.train()
        return True

    def run(self, *, resume: bool = False) -> TrainResult:
        """Trains to the last step.

        Args:
            resume: go on from the latest checkpoint in `out`, if there is one.
        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint of the current step was written first.
            NonFiniteLossError: the loss is NaN or infinite.
            ValueError: too many bad samples, or a checkpoint that does not fit.
        """
        random_state = self._load_latest() if resume else None
        start = self.progress.step
        self.sampler.start, self.sampler.stop = start, self.total
        pin = self.accelerator.device.type == "cuda"
        loader = make_loader(self.builder, self.sampler, workers=self.workers, pin_memory=pin)
        trackers = (
            make_trackers(self.config.trackers, self.out, settings=self.settings, resume_step=start if resume else None)
            if self.accelerator.is_main_process
            else []
        )
        display = TrainingDisplay(
            self.console, title=self.title, total=self.total, start=start, line_every=self.config.log_every * 5
        )
        try:
            with _signals() as stop_asked, display:
                if random_state is not None:
                    checkpoints.load_random(random_state)
                self._loop(iter(loader), trackers, display, stop_asked)
        except BaseException:
            if self.accelerator.is_main_process:  # its own counts only: the other processes may be gone
                self.ledger.write(self.out)
            raise
        finally:
            for tracker in trackers:
                tracker.close()
        ledger = self._collect_ledger()
        if self.accelerator.is_main_process:
            ledger.write(self.out)
        progress = self.progress
        return TrainResult(
            self.student, progress.step, progress.seconds, progress.best_step, progress.best_score, ledger
        )

    @property
    def student(self) -> DualEncoder:
        """The student as it would be saved now: the averaged one if there is an average."""
        student = self.method.student if self.average is None else self.average.module
        assert isinstance(student, DualEncoder)
        return student

    def _loop(
        self, batches: Iterator[Batch], trackers: list[Tracker], display: TrainingDisplay, stop_asked: threading.Event
    ) -> None:
        clock, seconds, pairs = time.perf_counter(), 0.0, 0  # the latter two since the last line
        self.wrapped.train()
        for batch in batches:
            self._enter_stage(display)
            values = self._step(batch)
            step = self.progress.step
            stopping = self._agreed(stop_asked.is_set())
            last = step == self.total
            numbers = {name: float(value) for name, value in values.items()} if self._logged(step) else {}
            elapsed, clock = time.perf_counter() - clock, time.perf_counter()
            seconds, pairs = seconds + elapsed, pairs + self.config.batch_size
            self.progress.seconds += elapsed
            if numbers:
                rate = pairs / seconds
                seconds, pairs = 0.0, 0
                for tracker in trackers:
                    tracker.log(step, {**numbers, "pairs_per_second": rate})
                left = (self.total - step) * self.config.batch_size / rate
                display.update(step, loss=numbers["loss"], pairs_per_second=rate, seconds_left=left)
            if self._validate_if_due(step, last, trackers, display):
                clock = time.perf_counter()
            if step % self.checkpoint_every == 0 or last or stopping:
                self._save()
            if stopping and not last:
                raise Interrupted(step, checkpoints.checkpoint_path(self.checkpoint_folder, step))

    def _enter_stage(self, display: TrainingDisplay) -> None:
        """Starts the stage that the next step belongs to, and tells how far it is: pure functions of the step, so that
        resuming needs no more."""
        number = bisect_right(self.ends, self.progress.step)
        begins = self.ends[number - 1] if number else 0
        self.method.progress = (self.progress.step - begins) / (self.ends[number] - begins)
        if self.stages[number] is self.stage:
            return
        self.stage = self.stages[number]
        if self._changed(partial(self.method.reshape, self.stage)):  # what was best before is another student
            self.progress.best_score = self.progress.best_step = None
        self.method.enter(self.stage)
        if len(self.stages) > 1:
            display.say(
                f"{self.title}: stage {number + 1}/{len(self.stages)} {self.stage.name}, steps {begins + 1} to "
                f"{self.ends[number]}"
            )

    def _logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.total

    def _step(self, batch: Batch) -> dict[str, Tensor | float]:
        self._count(batch)
        device = self.accelerator.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            # micro-batches bring their pixels to the device themselves, each when it is encoded
            moved = batch.to(device, non_blocking=True, images=self.method.micro_batch is None)
            terms: dict[str, Term] = self.wrapped(moved)
        if not terms:
            where = f" in stage {self.stage.name!r}" if len(self.stages) > 1 else ""
            raise ValueError(f"method {type(self.method).__name__} has no terms left{where}: every weight is zero")
        loss = torch.stack([term.weight * term.value.float() for term in terms.values()]).sum()
        rate = learning_rate(self.progress.step, total=self.total, config=self.optim, peak=self.stage.learning_rate)
        set_learning_rate(self.optimizer, rate)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.optim.max_gradient_norm or float("inf"))
        if not bool(loss.isfinite() & norm.isfinite()):  # before the step, so that no checkpoint holds what follows
            self._stop_on_non_finite(batch, terms, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step()
        if self.average is not None:
            self.average.update_parameters(self.method.student)
        self.progress.step += 1
        values: dict[str, Tensor | float] = {"loss": loss.detach()}
        values |= {f"terms/{name}": term.value.detach() for name, term in terms.items()}
        values |= self.method.measurements
        scale = self.method.student.log_logit_scale.detach().exp()
        return values | {"learning_rate": rate, "logit_scale": scale, "gradient_norm": norm.detach()}

    def _count(self, batch: Batch) -> None:
        self.ledger.add(len(batch), batch.bad)
        self.ledger.check_share(self.max_bad_share)

    def _stop_on_non_finite(self, batch: Batch, terms: dict[str, Term], norm: Tensor) -> None:
        values = ", ".join(f"{name} {term.value.item():g}" for name, term in terms.items())
        kept = checkpoints.list_checkpoints(self.checkpoint_folder)
        shown = ", ".join(batch.ids[:8]) + (f", ... ({len(batch.ids)} in all)" if len(batch.ids) > 8 else "")
        raise NonFiniteLossError(
            f"the loss or its gradient is not finite at step {self.progress.step + 1} ({values}, gradient norm "
            f"{float(norm):g}). Samples of this batch: {shown}. Last good checkpoint: "
            f"{kept[-1].name if kept else 'none yet'}. Lower optim.learning_rate, lengthen optim.warmup_steps, or use "
            "training.precision=fp32, in a new run folder: --resume repeats this run as it was."
        )

    def _validate_if_due(self, step: int, last: bool, trackers: list[Tracker], display: TrainingDisplay) -> bool:
        every = self.config.evaluate_every
        if self.validate is None or every is None or (step % every and not last):
            return False
        if self.accelerator.is_main_process:
            numbers = self.validate(self.student)
            self.wrapped.train()
            for tracker in trackers:
                tracker.log(step, {f"validation/{name}": value for name, value in numbers.items()})
            shown = "  ".join(f"{name} {value:.2f}" for name, value in numbers.items() if name != "score")
            display.say(f"{self.title}: step {step}/{self.total}  validation  {shown}")
            if self.progress.best_score is None or numbers["score"] > self.progress.best_score:
                self.progress.best_score, self.progress.best_step = numbers["score"], step
                weights = {"student": self.student.state_dict()}
                path = checkpoints.checkpoint_path(self.checkpoint_folder, step, "best")
                checkpoints.write_checkpoint(path, weights, self.progress)
                checkpoints.remove_old(self.checkpoint_folder, keep=1, kind="best")
        self.accelerator.wait_for_everyone()
        return True

    def _agreed(self, stop: bool) -> bool:
        """Whether any process was asked to stop: all then stop at the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor([int(stop)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    def _save(self) -> None:
        # every process has random state of its own; the rest is the same everywhere
        states = gather_object([checkpoints.random_tensors()])
        ledger = self._collect_ledger()
        if self.accelerator.is_main_process:
            self.progress.ledger, self.progress.structure = ledger.state_dict(), self.method.structure
            tensors = {
                "method": self.method.state_dict(),
                "optimizer": checkpoints.optimizer_tensors(self.optimizer),
                **{f"random-{rank}": state for rank, state in enumerate(states)},
            }
            if self.average is not None:
                tensors["average"] = self.average.state_dict()
            path = checkpoints.checkpoint_path(self.checkpoint_folder, self.progress.step)
            checkpoints.write_checkpoint(path, tensors, self.progress)
            checkpoints.remove_old(self.checkpoint_folder, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _load_latest(self) -> dict[str, Tensor] | None:
        """Restores everything but the random state, which is returned to be set last."""
        found = checkpoints.list_checkpoints(self.checkpoint_folder)
        if not found:
            return None
        tensors, self.progress = checkpoints.read_checkpoint(found[-1])
        if self.progress.step > self.total:
            raise ValueError(f"{found[-1]} is at step {self.progress.step}, beyond this run's {self.total}")
        self._changed(partial(self.method.restructure, self.progress.structure))
        self.method.load_state_dict(tensors["method"])
        checkpoints.load_optimizer(self.optimizer, tensors["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(tensors["average"])
        if self.accelerator.is_main_process:
            self.ledger.load_state_dict(self.progress.ledger)
        return tensors.get(f"random-{self.accelerator.process_index}")

    def _collect_ledger(self) -> SampleLedger:
        """The counts of all processes together."""
        if self.accelerator.num_processes == 1:
            return self.ledger
        total = SampleLedger()
        for state in gather_object([self.ledger.state_dict()]):
            total.merge(state)
        return total


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that the step under way is finished first; a second one acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may install handlers
        yield asked
        return

    def ask(_number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

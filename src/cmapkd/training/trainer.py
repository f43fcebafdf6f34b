"""The one loop: steps any method's student, logs, validates, checkpoints, and resumes exactly where it stopped."""

from __future__ import annotations

import signal
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
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

from cmapkd.cache import CachedTeacher
from cmapkd.config import RunStopped, writing
from cmapkd.data.batches import Batches, PlanSampler, make_loader
from cmapkd.data.check import SampleLedger
from cmapkd.data.types import Batch
from cmapkd.methods import Method, Term
from cmapkd.methods.stages import WHOLE, StageConfig, stage_ends
from cmapkd.models import DualEncoder
from cmapkd.training import checkpoint as checkpoints
from cmapkd.training.config import OptimConfig, TrainConfig
from cmapkd.training.memory import OutOfMemory, first_line, is_out_of_memory, memory_advice
from cmapkd.training.optim import learning_rate, make_optimizer, parameter_groups, set_learning_rate
from cmapkd.training.peak_memory import forget_peak, peak_bytes
from cmapkd.training.processes import start_processes, wait_for_all
from cmapkd.training.progress import TrainingDisplay
from cmapkd.training.sharding import ShardedMethod, load_sharded_optimizer, whole_optimizer
from cmapkd.training.trackers import Tracker, make_trackers

Validate = Callable[[DualEncoder], dict[str, float]]  # student -> numbers; `score` among them is what "best" means


class Interrupted(Exception):
    """The run was stopped by a signal after saving a checkpoint."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; saved {checkpoint.name}")
        self.step = step
        self.checkpoint = checkpoint


class NonFiniteLossError(RunStopped):
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
    peak_memory: int  # bytes, of this process since it began or went on


class Trainer:
    """Trains `method` on `builder`'s batches and leaves checkpoints and metrics in `out`.

    Args:
        builder: makes the batches; its source's length decides what an epoch is.
        validate: measures the student every `evaluate_every` steps; its `score` picks the best checkpoint.
        settings: the resolved config, handed to trackers that show it.
        max_bad_share: share of unreadable samples above which the run stops.
        timeout: seconds that a batch may take to be read before the run stops; 0: any time.
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
        timeout: float = 0.0,
        validate: Validate | None = None,
        settings: dict[str, Any] | None = None,
        console: Console | None = None,
        title: str = "train",
    ) -> None:
        self.config, self.optim, self.out, self.seed, self.workers = config, optim, out, seed, workers
        self.builder, self.validate, self.settings, self.title = builder, validate, settings or {}, title
        self.max_bad_share, self.timeout = max_bad_share, timeout
        start_processes(on_cpu=config.on_cpu)
        self.accelerator = Accelerator(
            mixed_precision="no",  # the loop's own autocast does it: accelerate's holds for the whole process
            cpu=config.on_cpu,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.console = console if self.accelerator.is_main_process else None
        self.method = method
        method.micro_batch, method.local_loss = config.micro_batch, config.local_loss
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
        if self.sharded is not None and any(stage.sparsity is not None for stage in self.stages):
            raise ValueError(
                "stages with masks end with a smaller student, whose weights are not shared out anew in this version: "
                "set training.sharding=none"
            )
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
        self.sharded = self._sharded() if config.sharding == "fsdp2" else None
        self.wrapped: Callable[[Batch], dict[str, Term]]
        self.optimizer: torch.optim.Optimizer
        optimizer = make_optimizer(method, self.optim)
        if self.sharded is not None:
            self.wrapped, self.optimizer, self.average = self.sharded, optimizer, self.sharded.average
        else:
            self.wrapped, self.optimizer = self.accelerator.prepare(method, optimizer)
            self.average = (
                AveragedModel(method.student, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
                if config.ema is not None
                else None
            )
        # before a stage freezes any: in the order in which checkpoints number what an optimizer knows of them
        self._numbered = [parameter for group in parameter_groups(method).values() for parameter in group]

    def _changed(self, change: Callable[[], None]) -> bool:
        """Lets the method change; where it has other parameters then, wrapper, optimizer and average begin anew."""
        before = [*self.method.parameters()]
        change()
        if [id(parameter) for parameter in before] == [id(parameter) for parameter in self.method.parameters()]:
            return False
        del self.wrapped, self.optimizer, self.average
        self.accelerator.free_memory()  # an old wrapper would go on to exchange gradients
        self._prepare()
        self.method.train()
        return True

    def run(self, *, resume: bool = False) -> TrainResult:
        """Trains to the last step.

        Args:
            resume: go on from the latest checkpoint in `out`, if there is one.
        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint of the current step was written first.
            NonFiniteLossError: the loss is NaN or infinite.
            TooManyBadSamples, WorkerDied, ReadTimeout, OutOfMemory, DiskError: what the data and the machine do.
            ValueError: a checkpoint that does not fit.
        """
        forget_peak(self.accelerator.device)
        random_state = self._load_latest() if resume else None
        start = self.progress.step
        self.sampler.start, self.sampler.stop = start, self.total
        pin = self.accelerator.device.type == "cuda"
        batches = make_loader(self.builder, self.sampler, workers=self.workers, pin_memory=pin, timeout=self.timeout)
        trackers = (
            make_trackers(self.config.trackers, self.out, settings=self.settings, resume_step=start if resume else None)
            if self.accelerator.is_main_process
            else []
        )
        display = TrainingDisplay(
            self.console, title=self.title, total=self.total, start=start, line_every=self.config.log_every * 5
        )
        try:
            with _signals() as stop_asked, display, closing(batches), self._memory_explained():
                if random_state is not None:
                    checkpoints.load_random(random_state)
                self._loop(batches, trackers, display, stop_asked)
        except BaseException:
            # why it stopped is what counts, so what the disk says to these last writes does not
            if self.accelerator.is_main_process:  # its own counts only: the other processes may be gone
                with suppress(OSError):
                    self.ledger.write(self.out)
            for tracker in trackers:
                with suppress(Exception):
                    tracker.close()
            raise
        with writing(self.out):
            for tracker in trackers:
                tracker.close()
        ledger = self._collect_ledger()
        if self.accelerator.is_main_process:
            with writing(self.out):
                ledger.write(self.out)
        progress = self.progress
        return TrainResult(
            self.student,
            progress.step,
            progress.seconds,
            progress.best_step,
            progress.best_score,
            ledger,
            peak_bytes(self.accelerator.device),
        )

    def _sharded(self) -> ShardedMethod | None:
        """The method shared out; one process alone has all of it.

        Raises:
            ValueError: there are heads, or a weighting that measures gradients by weights of which each process has a
                share.
        """
        if self.accelerator.num_processes == 1:
            return None
        if self.method.beside is not None:
            raise ValueError(
                "heads learn with the student, and are not shared out in this version: leave heads out, or set "
                "training.sharding=none"
            )
        if self.method.weighting_of_terms is not None and self.method.weighting_of_terms.reads_gradients:
            raise ValueError(
                "method.term_weighting measures gradients at the student's weights, of which with training.sharding="
                "fsdp2 every process has a share: choose another weighting, or sharding=none"
            )
        return ShardedMethod(
            self.method,
            device=self.accelerator.device,
            teachers=self.config.shard_teacher,
            ema=self.config.ema,
        )

    @property
    def student(self) -> DualEncoder:
        """The student as it would be saved now: the averaged one if there is an average.

        With `sharding: fsdp2` every process must ask for it, and the first has it.
        """
        if self.sharded is not None:
            return self.sharded.student()
        student = self.method.student if self.average is None else self.average.module
        assert isinstance(student, DualEncoder)
        return student

    def _loop(
        self, batches: Iterator[Batch], trackers: list[Tracker], display: TrainingDisplay, stop_asked: threading.Event
    ) -> None:
        clock, seconds, pairs = time.perf_counter(), 0.0, 0  # the latter two since the last line
        self.method.train()
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
                with writing(self.out):
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
        norm = self._clip(self.optim.max_gradient_norm or float("inf"))
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

    def _clip(self, max_norm: float) -> Tensor:
        if self.sharded is not None:
            self.sharded.average_gradients()
            return self.sharded.clip(max_norm)
        norm: Tensor = self.accelerator.clip_grad_norm_(self.method.parameters(), max_norm)
        return norm

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
        student = self.student
        if self.accelerator.is_main_process:
            numbers = self.validate(student.to(self.accelerator.device))
            self.method.train()
            with writing(self.out):
                for tracker in trackers:
                    tracker.log(step, {f"validation/{name}": value for name, value in numbers.items()})
            shown = "  ".join(
                f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.2f}"
                for name, value in numbers.items()
                if name != "score"
            )
            display.say(f"{self.title}: step {step}/{self.total}  validation  {shown}")
            if self.progress.best_score is None or numbers["score"] > self.progress.best_score:
                self.progress.best_score, self.progress.best_step = numbers["score"], step
                weights = {"student": student.state_dict()}
                path = checkpoints.checkpoint_path(self.checkpoint_folder, step, "best")
                checkpoints.write_checkpoint(path, weights, self.progress)
                checkpoints.remove_old(self.checkpoint_folder, keep=1, kind="best")
            if self.sharded is not None:
                student.cpu()
        wait_for_all()
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
        tensors = self.learned_state()
        if self.accelerator.is_main_process:
            self.progress.ledger, self.progress.structure = ledger.state_dict(), self.method.structure
            tensors |= {f"random-{rank}": state for rank, state in enumerate(states)}
            path = checkpoints.checkpoint_path(self.checkpoint_folder, self.progress.step)
            checkpoints.write_checkpoint(path, tensors, self.progress)
            checkpoints.remove_old(self.checkpoint_folder, keep=self.config.keep_checkpoints)
        wait_for_all()

    def learned_state(self) -> dict[str, dict[str, Tensor]]:
        """Method, optimizer and average as a checkpoint holds them, whole; every process must ask for it."""
        if self.sharded is not None:
            optimizer = whole_optimizer(self.optimizer, self._numbered)
            tensors = {"method": self.sharded.state(), "optimizer": optimizer}
            return tensors | ({"average": self.sharded.average_state()} if self.average is not None else {})
        tensors = {"method": self.method.state_dict(), "optimizer": checkpoints.optimizer_tensors(self.optimizer)}
        return tensors | ({"average": self.average.state_dict()} if self.average is not None else {})

    def _put_back(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """What `learned_state` gave, with or without shares."""
        self._changed(partial(self.method.restructure, self.progress.structure))
        if self.sharded is not None:
            self.sharded.load(tensors["method"])
            load_sharded_optimizer(self.optimizer, self._numbered, tensors["optimizer"])
            if self.average is not None:
                self.sharded.load_average(tensors["average"])
            return
        self.method.load_state_dict(tensors["method"])
        checkpoints.load_optimizer(self.optimizer, tensors["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(tensors["average"])

    def _load_latest(self) -> dict[str, Tensor] | None:
        """Restores everything but the random state, which is returned to be set last."""
        folder = self.checkpoint_folder
        with self.accelerator.main_process_first():
            if self.accelerator.is_main_process:
                checkpoints.restore_replaced(folder)
            found = checkpoints.read_latest(folder)
            if found is None:
                return None
            tensors, self.progress = found
            if self.progress.step > self.total:
                newest = checkpoints.checkpoint_path(folder, self.progress.step)
                raise ValueError(f"{newest} is at step {self.progress.step}, beyond this run's {self.total}")
            if self.accelerator.is_main_process:
                with writing(folder):
                    checkpoints.put_in_order(folder, self.progress)
        checkpoints.find_best(folder, self.progress)
        self._put_back(tensors)
        if self.accelerator.is_main_process:
            self.ledger.load_state_dict(self.progress.ledger)
        return tensors.get(f"random-{self.accelerator.process_index}")

    @contextmanager
    def _memory_explained(self) -> Iterator[None]:
        """Memory that runs out becomes advice on this run's own settings."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            live = [teacher for teacher in self.method.teachers.values() if not isinstance(teacher, CachedTeacher)]
            step = self.progress.step + 1
            advice = memory_advice(self.config, on_device=str(error), live_teacher=bool(live), workers=self.workers)
            raise OutOfMemory(f"memory ran out at step {step} ({first_line(error)}). {advice}") from error

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

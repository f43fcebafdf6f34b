"""The one loop: steps any method's student, logs, validates, checkpoints, and resumes exactly where it stopped."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from cmapkd.config import writing
from cmapkd.data.batches import Batches
from cmapkd.data.check import SampleLedger
from cmapkd.data.loading import PREFETCH_MIB, make_loader
from cmapkd.data.plans import PlanSampler
from cmapkd.data.types import Batch
from cmapkd.methods import Method, StepInfo
from cmapkd.methods.stages import WHOLE_RUN, StageConfig, stage_ends, stream_by_step
from cmapkd.methods.terms import total_loss
from cmapkd.models import Model
from cmapkd.training import checkpoint as checkpoints
from cmapkd.training.config import OptimConfig, TrainConfig
from cmapkd.training.engine import Engine, make_engine
from cmapkd.training.memory import OutOfMemory, first_line, is_out_of_memory, memory_advice
from cmapkd.training.optim import learning_rate, set_learning_rate
from cmapkd.training.peak_memory import forget_peak, peak_bytes
from cmapkd.training.processes import start_processes, wait_for_all
from cmapkd.training.progress import READING, Outlook, Pace, TrainingDisplay, shown_parts
from cmapkd.training.state import RunState, Tensors, TrainResult
from cmapkd.training.stopping import Agreement, FiniteWatch, Interrupted, signals
from cmapkd.training.trackers import Tracker, make_trackers

Validate = Callable[[Any], dict[str, float]]  # student -> numbers; `score` among them is what "best" means


class Trainer:
    """Trains `method` on `builder`'s batches and leaves checkpoints and metrics in `out`.

    Args:
        builder: makes the batches; its source's length decides what an epoch is.
        validate: measures the student every `evaluate_every` steps, in the first process; its `score` picks the best
            checkpoint. If it has an `assist`, the other processes call that with their student meanwhile.
        settings: the resolved config, handed to trackers that show it.
        contents: what data and models hold, kept in every checkpoint for whoever resumes.
        outlook: what the command does besides, for its estimate of the time left.
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
        prefetch_mib: int = PREFETCH_MIB,
        validate: Validate | None = None,
        settings: dict[str, Any] | None = None,
        contents: checkpoints.Contents | None = None,
        outlook: Outlook | None = None,
        console: Console | None = None,
        title: str = "train",
    ) -> None:
        self.config, self.optim, self.out, self.seed, self.workers = config, optim, out, seed, workers
        self.builder, self.validate, self.settings, self.title = builder, validate, settings or {}, title
        self.load = partial(make_loader, workers=workers, prefetch_mib=prefetch_mib, timeout=timeout)
        self.max_bad_share, self.contents, self.outlook = max_bad_share, contents or {}, outlook or Outlook()
        start_processes(on_cpu=config.on_cpu)
        self.accelerator = Accelerator(
            mixed_precision="no",  # the loop's own autocast does it: accelerate's holds for the whole process
            cpu=config.on_cpu,
        )
        self.console = console if self.accelerator.is_main_process else None
        self.sampler = PlanSampler(
            len(builder.source),
            batch_size=config.batch_size,
            seed=seed,
            start=0,
            stop=0,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            streams=builder.streams,
        )
        per_epoch = self.sampler.steps_per_epoch
        self.total = config.num_steps(per_epoch)
        self.stages: tuple[StageConfig, ...] = config.stages or method.default_stages or (WHOLE_RUN,)
        self.ends = stage_ends(self.stages, total=self.total, steps_per_epoch=per_epoch)
        self.sampler.only = stream_by_step(self.stages, self.ends)
        for stage in self.stages:
            if stage.data is not None:
                self.sampler.check_stream(stage.data)
        if method.equal_streams:
            self.sampler.check_shared_out()
        self.method = self._prepared(method)
        self.engine: Engine = make_engine(method, config, optim, self.accelerator)
        self.stage, self.info = WHOLE_RUN, StepInfo()
        self.checkpoint_every = config.checkpoint_every or max(1, self.total // 10)
        self.progress = checkpoints.Progress(total=self.total, contents=self.contents)
        self.ledger = SampleLedger()
        self.state = RunState(self.checkpoint_folder, self.accelerator, config, seed=seed)
        self.agreement, self.finite = Agreement(), FiniteWatch()

    @property
    def checkpoint_folder(self) -> Path:
        return self.out / "checkpoints"

    @property
    def student(self) -> Model:
        """The student as it would be saved now: the averaged one if there is an average.

        With `sharding: fsdp2` every process must ask for it, and the first has it.
        """
        return self.engine.student

    def _prepared(self, method: Method) -> Method:
        """The method told how this run trains, and checked against it before anything is wrapped."""
        config = self.config
        method.micro_batch = config.micro_batch
        method.local_loss = config.splits_losses(self.accelerator.num_processes)
        if config.train_parts is not None:
            method.train_only(config.train_parts)
        method.check_teachers()
        method.check_stages(self.stages)  # a wrong name shows now, not when its stage begins
        whole = method.why_whole(self.stages)
        if config.sharding != "none" and self.accelerator.num_processes > 1 and whole is not None:
            raise ValueError(f"{whole}, or set training.sharding=none")
        for teacher in method.teachers.values():
            teacher.to(self.accelerator.device)
        return method

    def _changed(self, change: Callable[[], None]) -> bool:
        """Lets the method change; where it has other parameters then, wrapper, optimizer and average begin anew."""
        before = [*self.method.parameters()]
        change()
        if [id(parameter) for parameter in before] == [id(parameter) for parameter in self.method.parameters()]:
            return False
        self.engine.close()
        del self.engine
        self.engine = make_engine(self.method, self.config, self.optim, self.accelerator)
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
        if resume and (progress := self.state.load(self.total, self._put_back)) is not None:
            self._take_up(progress)
            if self.accelerator.is_main_process:
                self.ledger.load_state_dict(progress.ledger)
        start = self.progress.step
        self.sampler.start, self.sampler.stop = start, self.total
        pin = self.accelerator.device.type == "cuda"
        batches = self.load(self.builder, self.sampler, pin_memory=pin)
        main = self.accelerator.is_main_process
        resumed = start if resume else None
        trackers = (
            make_trackers(self.config.trackers, self.out, settings=self.settings, resume_step=resumed) if main else []
        )
        display = TrainingDisplay(
            self.console, title=self.title, total=self.total, start=start, line_every=self.config.log_every * 5
        )
        try:
            with signals() as stop_asked, display, closing(batches), self._memory_explained():
                self.state.continue_random(start)
                self._loop(batches, trackers, display, stop_asked)
                self.agreement.close()
                self.state.finish()
        except BaseException:
            # why it stopped is what counts, so what the disk says to these last writes does not
            with suppress(Exception):
                self.state.background.wait()
            if main:  # its own counts only: the other processes may be gone
                with suppress(OSError):
                    self.ledger.write(self.out)
            for tracker in trackers:
                with suppress(Exception):
                    tracker.close()
            raise
        ledger = self.state.ledger_of_all(self.ledger)
        with writing(self.out):
            for tracker in trackers:
                tracker.close()
            if main:
                ledger.write(self.out)
        ledger.check_share(self.max_bad_share, minimum=1, ended=True)  # a short run too
        return self._result(ledger)

    def _take_up(self, progress: checkpoints.Progress) -> None:
        """Goes on from a checkpoint's progress, of a run that may have been shorter."""
        if progress.total not in (0, self.total):
            progress.extended.append({"at": progress.step, "from": progress.total})
        progress.total = self.total
        progress.contents = self.contents or progress.contents
        self.progress = progress

    def restore(self, path: Path) -> TrainResult:
        """The student as a checkpoint has it, of either kind, without a step of training. For one process.

        Raises:
            ValueError: the checkpoint is damaged, or of another run.
        """
        tensors, progress = checkpoints.read_checkpoint(path)
        self._changed(partial(self.method.restructure, progress.structure))
        if "method" in tensors:
            self.engine.load(tensors)
        else:
            self.student.load_state_dict(tensors["student"])
        self.progress = progress
        self.ledger.load_state_dict(progress.ledger or self.ledger.state_dict())
        return self._result(self.ledger)

    def _result(self, ledger: SampleLedger) -> TrainResult:
        progress, peak = self.progress, peak_bytes(self.accelerator.device)
        return TrainResult(
            self.student, progress.step, self.total, progress.seconds, progress.parts,
            progress.best_step, progress.best_score,
            progress.extended, ledger, peak,
        )  # fmt: skip

    def _loop(
        self, batches: Iterator[Batch], trackers: list[Tracker], display: TrainingDisplay, stop_asked: threading.Event
    ) -> None:
        every, size = self.config.evaluate_every, self.config.batch_size
        pace = Pace(self.outlook, total=self.total, batch_size=size, evaluate_every=every)
        self.method.train()
        for batch in pace.reading(batches):
            self._enter_stage(display)
            values = self._step(batch)
            step = self.progress.step
            stopping = self._agreed(stop_asked.is_set())
            last = step == self.total
            logged, saved = self._logged(step), step % self.checkpoint_every == 0 or last or stopping
            if logged or saved or self._validates(step) or self.finite.full:
                self.finite.check(self.state.kept)
            self.progress.seconds += pace.lap()
            self._count_parts(pace.waited, values)
            display.tick(step, pairs_per_second=pace.rate, seconds_left=pace.seconds_left(step))
            if logged:
                self._log({name: float(value) for name, value in values.items()}, pace, trackers, display)
            if self._validates(step):
                self._validate(trackers, display)
                pace.go()
            if saved:
                self._save()
            if stopping and not last:
                self.state.finish()
                raise Interrupted(step, checkpoints.checkpoint_path(self.checkpoint_folder, step))

    def _enter_stage(self, display: TrainingDisplay) -> None:
        """Notes where the next step stands, and begins its stage if that is another. Both are pure functions of the
        step, so that resuming needs no more."""
        step = self.progress.step
        number = bisect_right(self.ends, step)
        begins = self.ends[number - 1] if number else 0
        stage, done = self.stages[number], (step - begins) / (self.ends[number] - begins)
        self.info = self.method.step = StepInfo(step, self.total, stage, done, self.seed)
        if stage is self.stage:
            return
        self.finite.check(self.state.kept)
        self.stage = stage
        if self._changed(partial(self.method.reshape, stage)):  # what was best before is another student
            self.progress.best_score = self.progress.best_step = None
        self.method.enter(stage)
        self.engine.enter_stage()
        if len(self.stages) > 1:
            display.say(
                f"{self.title}: stage {number + 1}/{len(self.stages)} {stage.name}, steps {begins + 1} to "
                f"{self.ends[number]}"
            )

    def _step(self, batch: Batch) -> dict[str, Tensor | float]:
        """One optimizer step; values worth logging, on the device, for which the host does not wait."""
        info = self.info
        self.ledger.add(len(batch), batch.bad)
        self.ledger.check_share(self.max_bad_share)
        device = self.accelerator.device
        try:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
                # micro-batches bring their pixels to the device themselves, each when it is encoded
                moved = batch.to(device, non_blocking=True, images=self.config.micro_batch is None)
                terms = self.engine.wrapped(moved, info)
        except Exception:
            self.finite.check(self.state.kept)  # weights that are no numbers explain what a method then refuses
            raise
        if not terms:
            where = f" in stage {self.stage.name!r}" if len(self.stages) > 1 else ""
            raise ValueError(f"method {type(self.method).__name__} has no terms left{where}: every weight is zero")
        loss = total_loss(terms)
        rate = learning_rate(info.step, total=self.total, config=self.optim, peak=info.stage.learning_rate)
        set_learning_rate(self.engine.optimizer, rate)
        self.engine.backward(loss)
        norm = self.engine.clip(self.optim.max_gradient_norm or float("inf"))
        raw = {name: term.value for name, term in terms.items()}
        finite = self.finite.watch(loss, norm, step=info.step + 1, terms=raw, ids=batch.ids)
        self.engine.update(info, finite)
        self.progress.step += 1
        values: dict[str, Tensor | float] = {"loss": loss.detach()}
        values |= {f"terms/{name}": value.detach() for name, value in raw.items()}
        values |= self.method.measurements | self.method.student.measurements()
        return values | {"learning_rate": rate, "gradient_norm": norm.detach()}

    def _agreed(self, stop: bool) -> bool:
        return self.agreement.stop(stop)

    def _logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.total

    def _validates(self, step: int) -> bool:
        every = self.config.evaluate_every
        return self.validate is not None and every is not None and (step % every == 0 or step == self.total)

    def _log(self, numbers: dict[str, float], pace: Pace, trackers: list[Tracker], display: TrainingDisplay) -> None:
        step, rate, progress = self.progress.step, pace.line_rate(), self.progress
        with writing(self.out):
            for tracker in trackers:
                tracker.log(step, {**numbers, "pairs_per_second": rate})
        parts = shown_parts(progress.parts, progress.seconds, numbers)
        left = pace.seconds_left(step)
        display.update(step, loss=numbers["loss"], pairs_per_second=rate, seconds_left=left, parts=parts)

    def _count_parts(self, waited: float, values: Mapping[str, Tensor | float]) -> None:
        """Seconds that the step waited for its batch, and those that the method told on the host as `PART/seconds`."""
        self.progress.add_part(READING, waited)
        for name, value in values.items():
            if name.endswith("/seconds"):
                self.progress.add_part(name.removesuffix("/seconds"), float(value))

    def _validate(self, trackers: list[Tracker], display: TrainingDisplay) -> None:
        """Measures the student on the first process, and keeps it if it is the best so far."""
        student, step, progress = self.student, self.progress.step, self.progress
        if self.accelerator.is_main_process:
            assert self.validate is not None
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
            if progress.best_score is None or numbers["score"] > progress.best_score:
                progress.best_score, progress.best_step = numbers["score"], step
                progress.structure = self.method.structure
                self.state.save_best(student.state_dict(), progress)
            self.engine.release(student)
        elif (assist := getattr(self.validate, "assist", None)) is not None:
            assist(student)
        wait_for_all()

    def _save(self) -> None:
        ledger = self.state.ledger_of_all(self.ledger)
        self.progress.ledger, self.progress.structure = ledger.state_dict(), self.method.structure
        self.state.save(self.engine.own_shares() if self.state.shared else self.learned_state(), self.progress)

    def learned_state(self) -> Tensors:
        """Method, optimizer and average as a checkpoint holds them, whole; every process must ask for it."""
        return self.engine.state()

    def _put_back(self, path: Path, progress: checkpoints.Progress) -> None:
        """What a checkpoint holds of method, optimizer and average, whichever engine wrote it."""
        self._changed(partial(self.method.restructure, progress.structure))
        self.engine.read(path)

    @contextmanager
    def _memory_explained(self) -> Iterator[None]:
        """Memory that runs out becomes advice on this run's own settings."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            step, live = self.progress.step + 1, self.method.could_read_answers
            advice = memory_advice(self.config, on_device=str(error), live_teacher=live, workers=self.workers)
            raise OutOfMemory(f"memory ran out at step {step} ({first_line(error)}). {advice}") from error

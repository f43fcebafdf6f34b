"""One run, from config to evidence: training, baseline, scores."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from cmapkd.config import ConfigError, closest, printable, writing
from cmapkd.config.disk import write_text
from cmapkd.data.kept_counts import FILE_NAME, keeping, kept_counts
from cmapkd.results import RunResult, Scores
from cmapkd.run.build import open_training
from cmapkd.run.card import student_card
from cmapkd.run.config import RunConfig
from cmapkd.run.folder import prepare_folder, write_begun, write_json, write_yaml
from cmapkd.run.lock import locked
from cmapkd.run.measure import Measured, account, baseline_name, measure, share_of
from cmapkd.run.prolong import check_longer, prolonged, told
from cmapkd.run.train import Trained, train
from cmapkd.training import Trainer
from cmapkd.training.checkpoint import remove_finished
from cmapkd.training.processes import start_processes, wait_for_all, was_restarted


def run(
    config: RunConfig,
    *,
    out: str | Path,
    resume: bool = False,
    extend_to: int | None = None,
    console: Console | None = None,
    teacher_scores: Scores | None = None,
    keep: int | None = None,
) -> RunResult:
    """Trains the student, measures it beside its teacher and baseline, and leaves everything in `out`.

    Args:
        out: run folder, new or empty; with `resume`, one that an interrupted run of the same config left. Processes
            that torchrun started again resume by themselves.
        extend_to: go on with the run in `out` to so many steps; it may be finished.
        console: where progress is shown; none for silence.
        teacher_scores: this teacher's on the same final data, if they are known from another run; measured if none.
        keep: checkpoints that the finished run keeps; none: the last one, or none where the config keeps none.
    Returns:
        What `metrics.json` holds. In processes other than the first, an empty result.
    Raises:
        ConfigError: a name in the config is unknown, or `out` holds another run, or is being written by one.
        Interrupted, NonFiniteLossError, ValueError: see `Trainer.run`.
    """
    out = Path(out)
    if isinstance(config.baseline, Path) and not config.baseline.is_dir():
        known = ("none", "scratch")
        raise ConfigError(
            f"baseline {str(config.baseline)!r}{closest(str(config.baseline), known)} is neither "
            f"{' nor '.join(known)}, and there is no such run folder"
        )
    with keeping(out / FILE_NAME):
        return _run(config, out, console, resume=resume, extend_to=extend_to, scores=teacher_scores, keep=keep)


def _run(
    config: RunConfig,
    out: Path,
    console: Console | None,
    *,
    resume: bool,
    extend_to: int | None,
    scores: Scores | None,
    keep: int | None,
) -> RunResult:
    """See `run`."""
    if config.baseline == "scratch" and not config.method.reads_captions:
        open_training(config)  # what is wrong with the data themselves is no matter of the baseline
        try:
            open_training(config.scratch())
        except ConfigError as error:
            told = str(error).removeprefix("data.train: ")
            raise ConfigError(f"baseline scratch, which learns from captions: {told} Or set baseline=none.") from None
    if extend_to is not None:
        config = prolonged(config, out, extend_to)
    measured = Measured.open(config)  # first, so that a wrong name shows before the training and not after it
    state = start_processes(on_cpu=config.training.on_cpu)
    with locked(out) if state.is_main_process else nullcontext():
        command = Command(config, measured, state, out, console, longer=extend_to is not None)
        return command.run(resume=resume, teacher_scores=scores, keep=keep)


@dataclass(frozen=True, slots=True)
class Command:
    """One run in its folder, which is this process's or its main process's alone."""

    config: RunConfig
    measured: Measured
    state: PartialState
    out: Path
    console: Console | None
    longer: bool = False  # the run is prolonged

    def run(self, *, resume: bool, teacher_scores: Scores | None, keep: int | None) -> RunResult:
        """Trains, measures and writes; see `run`."""
        config, out, main = self.config, self.out, self.state.is_main_process
        with self.state.main_process_first():
            resume = resume or self.longer or (was_restarted() and (out / "config.yaml").exists())
            prepare_folder(out, config, resume=resume, write=main, longer=self.longer)
        if self.longer and main:
            self._say(told(config, out))
        student = train(
            config,
            self.measured,
            out=out,
            resume=resume,
            console=self.console,
            title="student",
            more_trainings=int(config.baseline == "scratch"),
            begin=self._begin,
        )
        baseline = self._baseline(resume=resume)
        if not main:
            if share_of(config).of > 1 and self.measured.final is not None:
                self._scores(student, baseline, teacher_scores)
            wait_for_all()
            return RunResult(out, {})
        metrics = self.measure(student, baseline, teacher_scores)
        kept = min(1, config.training.keep_checkpoints if keep is None else keep)
        for folder in (out, out / "baseline"):
            remove_finished(folder / "checkpoints", keep=kept)
        wait_for_all()
        if self.console is not None and student.result.ledger.num_bad:
            self._say(printable(student.result.ledger.summary()))
        return RunResult(out, metrics)

    def measure(self, student: Trained, baseline: Path | None, teacher_scores: Scores | None) -> dict[str, Any]:
        """What `metrics.json` holds, which is written."""
        config, out, final = self.config, self.out, self.measured.final
        scores = self._scores(student, baseline, teacher_scores)
        metrics = scores | account(config, student.result, student.extra_params, final)
        if student.remarks:
            metrics["remarks"] = list(student.remarks)
        write_begun(out, config)
        write_text(out / "student" / "README.md", student_card(config, metrics))
        write_json(out / "metrics.json", metrics)
        return metrics

    def _scores(self, student: Trained, baseline: Path | None, teacher_scores: Scores | None) -> dict[str, Any]:
        """See `measure.measure`; nothing in processes that assist the first."""
        final, device = self.measured.final, self.state.device
        return measure(
            self.config, final, student.student, baseline, teacher_scores, device=device, out=self.out, say=self._say
        )

    def _baseline(self, *, resume: bool) -> Path | None:
        """The folder of what the student is compared with, trained here if the config says so."""
        config, out = self.config, self.out
        if isinstance(config.baseline, Path):
            return config.baseline
        if config.baseline == "none":
            return None
        folder, alone = out / "baseline", config.scratch()
        if self.state.is_main_process:
            with writing(out):
                folder.mkdir(exist_ok=True)
            write_yaml(folder / "config.yaml", alone.plain())
        title = baseline_name(config, folder) or "scratch"
        train(alone, self.measured, out=folder, resume=resume, console=self.console, title=title)
        return folder

    def _begin(self, trainer: Trainer) -> None:
        """Writes what the run goes by from its next step on."""
        if self.longer:
            check_longer(trainer.method, trainer.stages, self.out)
        if not self.state.is_main_process:
            return
        if self.longer:
            write_yaml(self.out / "config.yaml", self.config.plain())
        if (kept := kept_counts()) is not None:
            kept.write()

    def _say(self, message: str) -> None:
        if self.console is not None and self.state.is_main_process:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

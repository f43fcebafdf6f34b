"""`finalize`: the student of a run that was stopped, or of its best step, with its scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cmapkd.config import ConfigError, load_config
from cmapkd.data.kept_counts import FILE_NAME, keeping
from cmapkd.results import RunResult
from cmapkd.run.config import RunConfig
from cmapkd.run.execute import Command
from cmapkd.run.folder import prepare_folder
from cmapkd.run.lock import locked
from cmapkd.run.measure import Measured
from cmapkd.run.train import restore
from cmapkd.training.checkpoint import list_checkpoints, restore_replaced
from cmapkd.training.processes import start_processes

BEST = "best"


def finalize(
    out: str | Path, *, step: str | None = None, overrides: Sequence[str] = (), console: Console | None = None
) -> RunResult:
    """Writes `student/` and `metrics.json` of a run from one of its checkpoints, without a step of training.

    The checkpoints stay, so a stopped run can still go on.

    Args:
        out: run folder.
        step: `best`, or the step of a checkpoint; none: the one that the run's end would take, which is the best where
            `training.student` says so and there is one, else the newest.
        overrides: settings that may change at a resume, or say where data and models are now: `key=value`.
    Raises:
        ConfigError: no run is there, or no such checkpoint; a setting may not change; data or models have changed.
        ValueError: the checkpoint is damaged.
    """
    out = Path(out)
    stored = out / "config.yaml"
    if not stored.is_file():
        raise ConfigError(f"there is no run in {out}: it has no config.yaml")
    config = load_config(RunConfig, stored, list(overrides))
    with locked(out), keeping(out / FILE_NAME):
        restore_replaced(out / "checkpoints")
        checkpoint = _checkpoint(out, step, prefers_best=config.training.student == BEST)
        prepare_folder(out, config, resume=True, write=True)
        measured = Measured.open(config)
        state = start_processes(on_cpu=config.training.on_cpu)
        if console is not None:
            console.print(f"taking the student out of {checkpoint}", highlight=False, markup=False, soft_wrap=True)
        trained = restore(config, measured, checkpoint, out=out, console=console)
        command = Command(config, measured, state, out, console)
        return RunResult(out, command.measure(trained, _baseline(config, out), None))


def _checkpoint(out: Path, step: str | None, *, prefers_best: bool) -> Path:
    """The checkpoint that is meant.

    Raises:
        ConfigError: it is not there; lists those that are.
    """
    folder = out / "checkpoints"
    steps, best = list_checkpoints(folder), list_checkpoints(folder, "best")
    if not steps and not best:
        raise ConfigError(f"{out} keeps no checkpoint: there is nothing to take a student from")
    if step is None and prefers_best and best:
        return best[-1]
    if step is None and steps:
        return steps[-1]
    found = {str(_step(path)): path for path in steps} | ({BEST: best[-1]} if best else {})
    if step not in found:
        asked = "the newest" if step is None else f"step {step}" if step != BEST else "a best one"
        raise ConfigError(f"{out} has no checkpoint of {asked}. It has --step {', '.join(found)}.")
    return found[step]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _baseline(config: RunConfig, out: Path) -> Path | None:
    """What the student is compared with, if it is trained already."""
    if isinstance(config.baseline, Path):
        return config.baseline
    return out / "baseline" if (out / "baseline" / "student").is_dir() else None

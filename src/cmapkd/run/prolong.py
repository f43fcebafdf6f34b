"""`--extend-to`: a run that has ended, or was stopped, goes on from its last checkpoint to more steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from cmapkd.config import ConfigError, counted
from cmapkd.methods import Method
from cmapkd.methods.stages import WHOLE_RUN, StageConfig
from cmapkd.run.config import RunConfig
from cmapkd.training.checkpoint import read_progress
from cmapkd.training.optim import learning_rate


def prolonged(config: RunConfig, out: Path, steps: int) -> RunConfig:
    """The config of the same run with `steps` steps.

    Raises:
        ConfigError: there is no run to prolong in `out`, it has so many steps already, or its stages fix its length.
    """
    stored = out / "config.yaml"
    if not stored.is_file():
        raise ConfigError(f"there is no run to extend in {out}: it has no config.yaml")
    check_one_stage(config.training.stages, out)
    progress = read_progress(out / "checkpoints")
    if progress is None:
        raise ConfigError(
            f"--extend-to goes on from the last checkpoint, and {out} has none (training.keep_checkpoints is how many "
            "are kept): start a longer run in a new folder"
        )
    had = progress.total or progress.step
    if steps <= had and _stored_steps(stored) != steps:
        raise ConfigError(f"--extend-to {steps}: {out} has {counted(had, 'step')} already, name more")
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps, "epochs": None})})


def check_one_stage(stages: Sequence[StageConfig], out: Path) -> None:
    """Refuses a run of stages, be they its recipe's or its method's own.

    Raises:
        ConfigError: it has some.
    """
    if any(stage != WHOLE_RUN for stage in stages):
        raise ConfigError(
            f"--extend-to: the stages of {out} ({', '.join(stage.name for stage in stages)}) say which steps belong to "
            "which, so a longer run is another run: start it in a new folder"
        )


def check_longer(method: Method, stages: Sequence[StageConfig], out: Path) -> None:
    """Refuses a run of stages, and one whose method cannot go on.

    Raises:
        ConfigError: as said.
    """
    check_one_stage(stages, out)
    if (reason := method.why_not_longer) is not None:
        raise ConfigError(f"--extend-to: {out} cannot be prolonged: {reason}. Start a longer run in a new folder")


def _stored_steps(stored: Path) -> int | None:
    """The length that is written down: of an extension that was begun, its own."""
    values = yaml.safe_load(stored.read_text(encoding="utf-8"))
    training = values.get("training") if isinstance(values, dict) else None
    steps = training.get("steps") if isinstance(training, dict) else None
    return steps if isinstance(steps, int) else None


def told(config: RunConfig, out: Path) -> str:
    """What prolonging does to the learning rate, in a line."""
    progress, total = read_progress(out / "checkpoints"), config.training.steps
    assert progress is not None
    assert total is not None
    step, optim, had = progress.step, config.optim, progress.total or progress.step
    if step >= total:
        return f"the run has its {counted(total, 'step')}: it is measured again"
    before, after = (learning_rate(step, total=each, config=optim) for each in (had, total))
    line = f"going on from step {step} to step {total}"
    if before == after:
        return line
    return (
        f"{line}. The schedule is that of {counted(total, 'step')}: the learning rate goes on at {after:.3g}, where "
        f"that of {had} steps had come to {before:.3g}"
    )

"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cmapkd.config import install_advice


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """One JSON object a line; a resume drops the lines after the checkpoint's step, so that none stands twice."""

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        if resume_step is not None and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            kept = [line for line in lines if _step_of(line) <= resume_step]
            shortened = path.with_name(f".{path.name}.writing")
            shortened.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            shortened.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line; a line cut short by a kill counts as after everything."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")


class TensorBoardTracker:
    def __init__(self, folder: Path, *, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                f"training.trackers names tensorboard, which is not installed: {install_advice('tensorboard')}"
            ) from None
        purge = None if resume_step is None else resume_step + 1  # what came after the checkpoint comes again
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError(
                f"training.trackers names wandb, which is not installed: {install_advice('wandb')}"
            ) from None
        self._run = wandb.init(project="cmapkd", name=folder.name, dir=str(folder), config=settings, resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def make_trackers(
    names: Sequence[str], folder: Path, *, settings: dict[str, Any], resume_step: int | None
) -> list[Tracker]:
    """The run's trackers; metrics.jsonl is always the first.

    Raises:
        ValueError: a tracker's package is not installed; says which extra brings it.
    """
    others: list[Tracker] = []  # first, so that a missing package leaves no file behind
    if "wandb" in names:
        others.append(WandbTracker(folder, settings))
    if "tensorboard" in names:
        others.append(TensorBoardTracker(folder, resume_step=resume_step))
    return [JsonlTracker(folder / "metrics.jsonl", resume_step=resume_step), *others]

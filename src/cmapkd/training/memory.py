"""Memory that ran out: how every allocator says it, and which settings of a run to change."""

from __future__ import annotations

import torch

from cmapkd.config import RESUME, RunStopped, resumable_keys
from cmapkd.data.config import DataConfig
from cmapkd.training.config import TrainConfig

_RESUMABLE = {
    f"{section}.{key}"
    for section, cls in (("training", TrainConfig), ("data", DataConfig))
    for key in resumable_keys(cls)
}
_SAID = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class OutOfMemory(RunStopped):
    """The memory of the device or of the machine ran out; says which settings of this run would take less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's allocators or the system could not give memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error).lower() for words in _SAID)


def memory_advice(config: TrainConfig, *, on_device: str, live_teacher: bool, workers: int) -> str:
    """What this run has not yet done to take less: first what a resume takes, then what makes it another run.

    Args:
        on_device: the error's words, which tell a GPU's memory from the machine's.
        live_teacher: a teacher is in memory that a cache could answer for.
        workers: data workers, whose memory is the machine's.
    """
    size = config.micro_batch or config.batch_size
    smaller = max(1, size // 4)
    advice = {
        "training.micro_batch": f"={smaller} (now {config.micro_batch or 'none'}): the same losses and gradients",
    }
    if "cuda" not in on_device.lower() and workers:
        advice["data.workers"] = f" smaller (now {workers})"
        advice["data.memory"] = " smaller"
    if live_teacher:
        advice["cache"] = "=auto: the teacher answers from disk"
    if config.precision == "fp32":
        advice["training.precision"] = "=bf16"
    advice["training.batch_size"] = f" smaller (now {config.batch_size})"
    kept = "; ".join(key + how for key, how in advice.items() if key in _RESUMABLE)
    anew = "; ".join(key + how for key, how in advice.items() if key not in _RESUMABLE)
    return (
        f"What takes less, and may change when you {RESUME}: {kept}. What makes it another run, in a new folder: {anew}"
    )


def first_line(error: BaseException) -> str:
    """The error's first words."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__

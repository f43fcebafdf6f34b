"""Why a run stops before its end: a signal that any process got, or a loss that is no number."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cmapkd.config import RunStopped


class Interrupted(Exception):
    """The run was stopped by a signal after saving a checkpoint."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; saved {checkpoint.name}")
        self.step = step
        self.checkpoint = checkpoint


class NonFiniteLossError(RunStopped):
    """The loss became NaN or infinite. Names the step, the terms and the samples; checkpoints are from before it."""


@contextmanager
def signals() -> Iterator[threading.Event]:
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


class Agreement:
    """Whether any process was asked to stop, so that all stop after the same step.

    Several processes know of a request one step after it came. The exchange runs on the hosts while the step computes,
    so no process waits for its device. Every process must make one, and call it in every step.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group: Any = dist.new_group(backend="gloo") if several else None
        self._asked: tuple[Any, Tensor] | None = None

    def stop(self, asked: bool) -> bool:
        """Tells the others whether this process was asked to stop; the same answer in every process."""
        if self.group is None:
            return asked
        agreed = self._answer()
        flag = torch.tensor([int(asked)])
        self._asked = dist.all_reduce(flag, group=self.group, async_op=True), flag
        return agreed

    def close(self) -> None:
        """Waits for the exchange under way, which the others wait for, too."""
        self._answer()

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        exchange, flag = self._asked
        self._asked = None
        exchange.wait()
        return bool(flag)


class FiniteWatch:
    """Notes whether each step's loss and gradient are finite, and reads the notes where the host waits in any case.

    Reading in every step would make the host wait for the device. So a step that is not finite is told of at the next
    log line, or after `LONGEST` steps. Nothing may be saved or measured before `check`.
    """

    LONGEST = 32
    """Steps that may wait to be read: their samples' names are kept for the message."""

    def __init__(self) -> None:
        self._waiting: list[_Noted] = []

    @property
    def full(self) -> bool:
        """Whether the notes should be read now, at whatever step; the same in every process."""
        return len(self._waiting) >= self.LONGEST

    def watch(
        self, loss: Tensor, norm: Tensor, *, step: int, terms: Mapping[str, Tensor], ids: Sequence[str]
    ) -> Tensor:
        """Takes note of a step without waiting for it; whether it is finite, on the device.

        Args:
            loss, norm: scalars of the step: its loss and the norm of its gradient.
            step: its number, 1 for the first.
            terms: raw values by name, and `ids` of the samples, for the message.
        """
        finite = loss.detach().isfinite() & norm.detach().isfinite()
        values = {name: value.detach() for name, value in terms.items()}
        self._waiting.append(_Noted(finite, step, values, norm.detach(), ids))
        return finite

    def check(self, checkpoints: Callable[[], Sequence[Path]]) -> None:
        """Waits for the steps that were noted since the last check.

        Args:
            checkpoints: lists them, oldest first; asked for the message alone.
        Raises:
            NonFiniteLossError: loss or gradient of one of them is not finite; names the first.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting or bool(torch.stack([noted.finite for noted in waiting]).all()):
            return
        first = next(noted for noted in waiting if not bool(noted.finite))
        kept, ids = checkpoints(), first.ids
        values = ", ".join(f"{name} {float(value):g}" for name, value in first.terms.items())
        shown = ", ".join(ids[:8]) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")
        raise NonFiniteLossError(
            f"the loss or its gradient is not finite at step {first.step} ({values}, gradient norm "
            f"{float(first.norm):g}). Samples of this batch: {shown}. Last good checkpoint: "
            f"{kept[-1].name if kept else 'none yet'}. Lower optim.learning_rate, lengthen optim.warmup_steps, or use "
            "training.precision=fp32, in a new run folder: a resume repeats this run as it was."
        )


class _Noted(NamedTuple):
    """A step that `FiniteWatch` has not read yet; tensors are on the device."""

    finite: Tensor
    step: int
    terms: Mapping[str, Tensor]
    norm: Tensor
    ids: Sequence[str]

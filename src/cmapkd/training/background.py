"""Writing beside the training: what is to be written is copied, and one thread writes it while the steps go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Background:
    """Does one job after the other in a thread, in the order in which they came.

    A job that fails is the last one: those that wait behind it are left undone, as if the process had ended there. Its
    error comes out of the next `wait`. A job that other processes take part in is done all the same: they wait for it.
    The interpreter ends only when the thread is done.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: dict[str, Future[None]] = {}  # by kind, the last one
        self._failed: BaseException | None = None

    def start(self, kind: str, job: Callable[[], None], *, awaited: bool = False) -> None:
        """Does the job soon. Call `wait(kind)` before, so that no more than one of a kind is waiting.

        Args:
            awaited: other processes take part in the job.
        Raises:
            BaseException: that of an earlier job.
        """
        self._raise()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="cmapkd-writer")
        self._pending[kind] = self._thread.submit(self._run, job, awaited)

    def wait(self, kind: str | None = None) -> None:
        """Returns when the last job of a kind is done; None: every job, and the thread has ended.

        Raises:
            BaseException: that of a job, whichever its kind.
        """
        kinds = [*self._pending] if kind is None else [kind]
        for each in kinds:
            if (future := self._pending.pop(each, None)) is not None:
                future.result()
        if kind is None and self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self._raise()

    def _run(self, job: Callable[[], None], awaited: bool) -> None:
        if self._failed is not None and not awaited:
            return
        try:
            job()
        except BaseException as error:
            self._failed = self._failed or error

    def _raise(self) -> None:
        if (error := self._failed) is not None:
            self._failed = None
            raise error


class HostCopies:
    """Copies of named tensors on the host, in memory that is used again: making new pages takes longer than the copy.

    Of tensors on a GPU the copies are pinned, and all are made at once.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Tensor] = {}

    def of(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The tensors as they are now, contiguous. The copies of the call before are overwritten."""
        held: dict[tuple[str, str], Tensor] = {}
        with torch.no_grad():
            for group, tensors in groups.items():
                for name, value in tensors.items():
                    held[group, name] = self._room(self._held.get((group, name)), value).copy_(value, non_blocking=True)
        if any(value.is_cuda for tensors in groups.values() for value in tensors.values()):
            torch.cuda.synchronize()
        self._held = held
        return {group: {name: held[group, name] for name in tensors} for group, tensors in groups.items()}

    @staticmethod
    def _room(held: Tensor | None, value: Tensor) -> Tensor:
        if held is not None and held.shape == value.shape and held.dtype == value.dtype:
            return held
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)

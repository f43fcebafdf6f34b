"""Reading ahead in worker processes that may die or hang, without losing or changing anything."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from cmapkd.config import RESUME, RunStopped

T = TypeVar("T")
P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)

MOST_AHEAD = 4  # items that each worker makes ahead
AHEAD_BYTES = 8 * 2**30  # that all workers together hold ahead
SHARED_MEMORY = "/dev/shm"  # where items wait until they are taken
MAX_DEATHS = 3  # of workers in one pass over the data, before the run stops
_GRACE = 2.0  # seconds in which the system tells of a death that a broken connection spoke of


class WorkerDied(RunStopped):
    """Data workers were killed again and again. Says by what, and what to change."""


class ReadTimeout(RunStopped):
    """Reading did not end in time. Says what was being read."""


class WorkerWarning(UserWarning):
    """A data worker was killed, and others have taken its place."""


class ReadAhead(Generic[P, T]):
    """`dataset[place]` for each of `places`, in their order, made by `workers` processes (0: by this one).

    A dataset makes the same of a place in any process, so when a worker is killed (by the system, when memory runs out)
    all of them are replaced, which begin where the deliveries ended. What they make does not change by it.

    Args:
        timeout: seconds that one place may take before the pass ends; 0: any time.
        item_bytes: about the size of what is made of a place, to bound how much is made ahead; 0: small.
        name: what is read at a place, for messages.
    Raises (on the way):
        WorkerDied: more than `MAX_DEATHS` workers were killed.
        ReadTimeout: a place took longer than `timeout`.
    """

    def __init__(
        self,
        dataset: Dataset[T],
        places: Iterable[P] | SkipsPlaces[P],
        *,
        workers: int,
        pin_memory: bool = False,
        timeout: float = 0.0,
        item_bytes: int = 0,
        name: Callable[[P], str] = str,
    ) -> None:
        self.workers, self.prefetch = made_ahead(workers, item_bytes)
        self.dataset, self.places, self.pin_memory = dataset, places, pin_memory
        self.timeout, self.name = timeout, name
        if workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork

    def __iter__(self) -> Iterator[T]:
        done = deaths = 0
        while True:
            iterator, processes = self._start(done)
            try:
                while True:
                    try:
                        with _alarm(0.0 if self.workers else self.timeout):
                            made = next(iterator)
                    except StopIteration:
                        return
                    except _Alarm:
                        raise self._late(done) from None
                    except (RuntimeError, OSError, EOFError) as error:
                        if dead := _killed(processes):
                            deaths += 1
                            self._note(deaths, dead, done)
                            break
                        if self.workers and "timed out" in str(error):
                            raise self._late(done) from None
                        raise
                    done += 1
                    yield made
            finally:
                del iterator  # torch asks its workers to end and waits a little
                for process in processes:  # one that hangs in a read does not hear that
                    if process.is_alive():
                        process.kill()

    def _start(self, done: int) -> tuple[Iterator[T], list[BaseProcess]]:
        loader: DataLoader[T] = DataLoader(
            self.dataset,
            sampler=RemainingPlaces(self.places, done),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            prefetch_factor=self.prefetch if self.workers else None,
            worker_init_fn=_leave_signals,
            collate_fn=_as_it_is,
            timeout=self.timeout if self.workers else 0,
            generator=torch.Generator(),  # its own, so that making a loader draws nothing from the run's random state
        )
        before = {process.pid for process in multiprocessing.active_children()}
        with _no_child_handler():
            iterator = iter(loader)
        return iterator, [process for process in multiprocessing.active_children() if process.pid not in before]

    def _late(self, done: int) -> ReadTimeout:
        return ReadTimeout(
            f"nothing came for {self.timeout:g} seconds while reading {self._place(done)}: the disk or network drive "
            f"under the data may hang. Check it and {RESUME}, or raise data.timeout, in an evaluation "
            "evaluation.timeout (0: wait for ever)"
        )

    def _note(self, deaths: int, dead: list[BaseProcess], done: int) -> None:
        how = ", ".join(_ending(process) for process in dead)
        where = f"{self._place(done)} or what follows"  # nobody knows how far ahead it was
        if deaths > MAX_DEATHS:
            raise WorkerDied(
                f"data workers died {deaths} times, the last {how} while reading {where}. The system kills "
                "processes when memory runs out: lower data.workers, data.memory or training.batch_size (bus error: "
                f"/dev/shm is full, give the container more or set data.workers=0), and {RESUME}"
            )
        warnings.warn(
            f"a data worker died ({how}) while reading {where}: new ones go on from there with the same "
            f"data ({deaths} of at most {MAX_DEATHS} times)",
            WorkerWarning,
            stacklevel=3,
        )

    def _place(self, done: int) -> str:
        return next((self.name(place) for place in RemainingPlaces(self.places, done)), "the end")


def made_ahead(workers: int, item_bytes: int) -> tuple[int, int]:
    """How many workers there are room for, and how many items each of them may make ahead, in [1, `MOST_AHEAD`].

    All together they hold no more than `AHEAD_BYTES`, and no more than half of the shared memory that is free; one item
    is always made. Fewer workers than asked for are warned of.
    """
    if not workers or not item_bytes:
        return workers, MOST_AHEAD
    room = AHEAD_BYTES
    with suppress(OSError):
        room = min(room, shutil.disk_usage(SHARED_MEMORY).free // 2)
    fitting = max(1, min(workers, room // item_bytes))
    if fitting < workers:
        warnings.warn(
            f"a batch takes {item_bytes / 2**30:.2f} GiB and there is room for {room / 2**30:.2f} GiB of them to wait: "
            f"{fitting} of {workers} data workers are started. Lower training.batch_size, or give {SHARED_MEMORY} more "
            "room",
            WorkerWarning,
            stacklevel=3,
        )
    return fitting, max(1, min(MOST_AHEAD, room // (fitting * item_bytes)))


class SkipsPlaces(Protocol[P_co]):
    """Places that begin anywhere without counting up to there, as `PlanSampler` does."""

    def skip(self, count: int) -> Iterator[P_co]:
        """All but the first `count`."""
        ...


class RemainingPlaces(Generic[P]):
    """The places from number `start` on. Those that are a sequence, or can `skip`, are not made before that."""

    def __init__(self, places: Iterable[P] | SkipsPlaces[P], start: int) -> None:
        self.places, self.start = places, start

    def __iter__(self) -> Iterator[P]:
        places: Any = self.places
        if hasattr(places, "skip"):
            return iter(places.skip(self.start))
        if isinstance(places, Sequence):
            return iter(places[self.start :])
        return islice(iter(places), self.start, None)


class _Alarm(BaseException):
    """Not an `Exception`, which decoders of pictures would take for a damaged one."""


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Interrupts what this process is reading; only the main thread can be interrupted."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _Alarm

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def _no_child_handler() -> Iterator[None]:
    """Takes torch's SIGCHLD handler off again: it raises wherever the process happens to be when a worker dies, in the
    middle of an optimizer step too. Without it the death shows where the next batch is asked for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", "").startswith("torch."):  # of a loader elsewhere in the process
        before = signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _killed(processes: list[BaseProcess]) -> list[BaseProcess]:
    """Workers that ended by a signal or an error of their own."""
    deadline = time.monotonic() + _GRACE
    while processes and time.monotonic() < deadline:
        if dead := [process for process in processes if process.exitcode]:
            return dead
        time.sleep(0.02)
    return []


def _ending(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _leave_signals(_: int) -> None:
    """Ctrl-C and SIGTERM reach workers too: they go on, so that the training process can finish its step and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_it_is(made: Any) -> Any:
    return made

"""Reading ahead in worker processes that may die or hang, without losing or changing anything."""

from __future__ import annotations

import mmap
import os
import pickle
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count, islice
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

from torch.utils.data import Dataset

from cmapkd.config import RESUME, RunStopped
from cmapkd.data.crew import Crew, Task, Worker
from cmapkd.data.extras import pin_extra
from cmapkd.data.ring import BESIDE, SHARED_MEMORY, Blocks, Landing, Message, NoRoom, Raised, Ring, unpack

T = TypeVar("T")
P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)

MOST_AHEAD = 4  # items that each worker makes ahead
AHEAD_BYTES = 8 * 2**30  # that all workers together hold ahead
MAX_DEATHS = 3  # of workers in one pass over the data, before the run stops
SLICES = 8  # in which a timeout is counted: a pause of all processes (Ctrl-Z, a suspended job) counts as one at most


class WorkerDied(RunStopped):
    """Data workers were killed again and again. Says by what, and what to change."""


class ReadTimeout(RunStopped):
    """Reading did not end in time. Says what was being read."""


class WorkerWarning(UserWarning):
    """A data worker was killed, and others have taken its place."""


class ReadAhead(Generic[P, T]):
    """`dataset[place]` for each of `places`, in their order, made by `workers` processes (0: by this one).

    What workers make waits in slots of shared memory that are used again and again (`data.ring`). A dataset makes the
    same of a place in any process. So when a worker is killed (by the system, when memory runs out), another one makes
    what it had not handed over. What is delivered does not change by it.

    Args:
        pin_memory: whether tensors are delivered in page-locked memory.
        timeout: seconds that one place may take before the pass ends; 0: any time. Hardly counts while it is paused.
        item_bytes: about the size of what is made of a place, to bound how much is made ahead; 0: small.
        room: bytes that all slots together may take.
        most: items that each worker may make ahead.
        together: how many items, one after the other, are joined into one when they are delivered (`ring.joined`).
        name: what is read at a place, for messages.
    Raises (on the way):
        WorkerDied: more than `MAX_DEATHS` workers were killed, or the shared memory has no room for one slot.
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
        room: int = AHEAD_BYTES,
        most: int = MOST_AHEAD,
        together: int = 1,
        name: Callable[[P], str] = str,
    ) -> None:
        self.slot_bytes = slot_bytes(item_bytes)
        self.workers, self.prefetch = made_ahead(workers, item_bytes and self.slot_bytes, room=room, most=most)
        self.dataset, self.places, self.pin_memory, self.together = dataset, places, pin_memory, together
        self.timeout, self.name, self.room = timeout, name, room
        if workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork

    def __iter__(self) -> Iterator[T]:
        return self._helped() if self.workers else self._alone()

    def _alone(self) -> Iterator[T]:
        for place in RemainingPlaces(self.places, 0):
            try:
                with _alarm(self.timeout):
                    made = self.dataset[place]
            except _Alarm:
                raise self._late(self.name(place)) from None
            yield pin_extra(made) if self.pin_memory else made

    def _helped(self) -> Iterator[T]:
        waiting = _Waiting(self)
        try:
            blocks = Blocks(pinned=self.pin_memory)
            for number in count():
                if (found := waiting.take(number)) is None:
                    return
                task, message = found
                if number % self.together == 0:
                    landing = Landing(self.together, blocks)
                made = unpack(message, waiting.ring[task.slot], landing)
                waiting.done(task)
                if isinstance(made, Raised):
                    raise made.again()
                yield pin_extra(made) if self.pin_memory else made
        finally:
            waiting.crew.stop()

    def _late(self, place: str) -> ReadTimeout:
        return ReadTimeout(
            f"nothing came for {self.timeout:g} seconds while reading {place}: the disk or network drive "
            f"under the data may hang. Check it and {RESUME}, or raise data.timeout, in an evaluation "
            "evaluation.timeout (0: wait for ever)"
        )


class _Waiting(Generic[P, T]):
    """One pass: tasks that are not made yet, items that wait for their turn, and free slots."""

    def __init__(self, ahead: ReadAhead[P, T]) -> None:
        self.ahead, self.deaths = ahead, 0
        self.places = enumerate(RemainingPlaces(ahead.places, 0))
        self.next = next(self.places, None)
        size = max(ahead.slot_bytes, 4 * len(self._said()))  # other places are as long as the first, or nearly so
        slots = min(ahead.workers * ahead.prefetch, max(1, ahead.room // size))
        self.ring = Ring(slots, size)
        self.free = [*reversed(range(slots))]
        self.names: dict[int, P] = {}  # places of what is being made, or waits
        self.ready: dict[int, tuple[Task, Message]] = {}
        self.crew = Crew(ahead.dataset, self.ring, ahead.workers if self.next is not None else 0)

    def take(self, number: int) -> tuple[Task, Message] | None:
        """Item `number`, waited for; None where there is none."""
        left = self.ahead.timeout
        while True:
            self._fill()
            if number in self.ready:
                return self.ready.pop(number)
            if number not in self.names:
                return None
            if self.ahead.timeout and left <= 0:
                raise self.ahead._late(self.ahead.name(self.names[number]))
            asked, begun = min(left, self.ahead.timeout / SLICES), time.monotonic()
            made, died = self.crew.wait(asked or None)
            left -= min(asked, time.monotonic() - begun)
            self.ready |= {task.number: (task, message) for task, message in made}
            for worker in died:
                self._replaced(worker)

    def done(self, task: Task) -> None:
        """Its slot is free, and gets a task before anything else happens."""
        del self.names[task.number]
        self.free.append(task.slot)  # the last one that was used is the first one to be used again
        self._fill()

    def _said(self) -> bytes:
        return b"" if self.next is None else pickle.dumps(self.next[1], pickle.HIGHEST_PROTOCOL)

    def _fill(self) -> None:
        while self.next is not None and self.free:
            number, place = self.next
            try:
                self.ring.reserve(self.free[-1])
            except NoRoom as error:
                self._smaller(error)
                continue
            self.names[number] = place
            self.crew.send(Task(number, self.free.pop(), self._said()))
            self.next = next(self.places, None)

    def _smaller(self, error: NoRoom) -> None:
        """Goes on without the slots for which there is no memory."""
        left = [slot for slot in self.free if self.ring.has(slot)]
        if not left and not self.names:
            raise WorkerDied(
                f"{SHARED_MEMORY} has no room for {self.ring.slot_bytes / 2**20:.0f} MiB ({error.strerror}), which is "
                f"what data workers hand over at once: give it more, or set data.workers=0, and {RESUME}"
            )
        warnings.warn(
            f"{SHARED_MEMORY} is full: data workers make {len(left) + len(self.names)} items ahead, not "
            f"{self.ring.slots}. Give it more room, or lower data.prefetch_mib",
            WorkerWarning,
            stacklevel=3,
        )
        self.free = left

    def _replaced(self, worker: Worker) -> None:
        """Warns of a death, and has others make what the worker had not handed over.

        Raises:
            WorkerDied: it was one too many.
        """
        self.deaths += 1
        lost = [*worker.tasks.values()]
        place = self.ahead.name(self.names[lost[0].number]) if lost else "nothing"
        how, where = worker.ending(), f"{place} or what follows"  # it may have been killed between two
        if self.deaths > MAX_DEATHS:
            raise WorkerDied(
                f"data workers died {self.deaths} times, the last {how} while reading {where}. The system kills "
                "processes when memory runs out: lower data.workers, data.memory or training.batch_size (bus error: "
                f"{SHARED_MEMORY} is full, give the container more or set data.workers=0), and {RESUME}"
            )
        warnings.warn(
            f"a data worker died ({how}) while reading {where}: a new one goes on from there with the same "
            f"data ({self.deaths} of at most {MAX_DEATHS} times)",
            WorkerWarning,
            stacklevel=3,
        )
        for task in lost:
            self.crew.send(task)


def slot_bytes(item_bytes: int) -> int:
    """Of a slot for items of about this size: whole pages, with room for names and numbers."""
    return -(-(item_bytes + item_bytes // 32 + BESIDE) // mmap.PAGESIZE) * mmap.PAGESIZE


def made_ahead(workers: int, item_bytes: int, *, room: int = AHEAD_BYTES, most: int = MOST_AHEAD) -> tuple[int, int]:
    """How many workers there are room for, and how many items each of them may make ahead, in [1, `most`].

    All together they hold no more than `room` bytes, and no more than half of the shared memory that is free; one item
    is always made. Fewer workers than asked for are warned of.
    """
    if not workers or not item_bytes:
        return workers, MOST_AHEAD
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
    return fitting, max(1, min(most, room // (fitting * item_bytes)))


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

    left = SLICES

    def ring(_number: int, _frame: FrameType | None) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise _Alarm

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds / SLICES, seconds / SLICES)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)

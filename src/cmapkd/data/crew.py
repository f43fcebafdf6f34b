"""Worker processes that make items, one ring for all of them, and what is known of each: busy, done, dead."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import Dataset

from cmapkd.data.ring import Message, Raised, Ring, Room, filling, pack

_LOOK = 5.0  # seconds after which a worker without work looks whether its main process lives
_FAREWELL = 0.5  # seconds in which workers may end by themselves
_GRACE = 2.0  # seconds in which the system tells how a process ended


@dataclass(frozen=True, slots=True)
class Task:
    """An item to be made: its number, the slot that it goes through, and what is said to the worker."""

    number: int
    slot: int
    said: bytes


@dataclass(slots=True, eq=False)
class Worker:
    """A process, the pipe to it, and its tasks in their order."""

    process: BaseProcess
    pipe: Connection
    tasks: dict[int, Task] = field(default_factory=dict)

    def ending(self) -> str:
        """How it ended, in words."""
        self.process.join(_GRACE)
        code = self.process.exitcode or 0
        return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


class Crew:
    """So many processes that make items of a dataset.

    Tasks go through the slots of the ring, and so do items. Pipes carry numbers, and what does not fit into a slot.
    """

    def __init__(self, dataset: Dataset[Any], ring: Ring, workers: int) -> None:
        self.dataset, self.ring = dataset, ring
        self.workers: list[Worker] = []
        self.stop = weakref.finalize(self, _stop, self.workers, os.getpid())  # at the end of the process too
        for _ in range(workers):
            self._start()

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=_work, args=(self.dataset, self.ring, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends with the worker
        self.workers.append(Worker(process, ours))

    def send(self, task: Task) -> None:
        """Gives a task to the worker that has fewest."""
        worker = min(self.workers, key=lambda each: len(each.tasks))
        worker.tasks[task.number] = task
        self.ring[task.slot][: len(task.said)] = torch.frombuffer(bytearray(task.said), dtype=torch.uint8)
        with suppress(OSError):  # it is dead, which `wait` notices
            worker.pipe.send((task.number, task.slot, len(task.said)))

    def wait(self, timeout: float | None) -> tuple[list[tuple[Task, Message]], list[Worker]]:
        """What has been made, and workers that died; nothing of both where nothing happens for `timeout` seconds.

        A dead worker has another in its place. Its tasks are nobody's.
        """
        made: list[tuple[Task, Message]] = []
        died: list[Worker] = []
        of: dict[Any, Worker] = {each.pipe: each for each in self.workers}
        of |= {each.process.sentinel: each for each in self.workers}
        for worker in dict.fromkeys(of[ready] for ready in connection.wait([*of], timeout)):
            dead = not worker.process.is_alive()
            try:
                while worker.pipe.poll():
                    number, message = worker.pipe.recv()
                    made.append((worker.tasks.pop(number), message))
            except (EOFError, OSError):  # it died, perhaps in the middle of what it said
                dead = True
            if dead:
                self.workers.remove(worker)
                worker.pipe.close()
                self._start()
                died.append(worker)
        return made, died


def _stop(workers: list[Worker], owner: int) -> None:
    """Workers without a task end when their pipe does; others, which may hang in a read, are killed."""
    if os.getpid() != owner:  # a fork of the main process
        return
    for worker in workers:
        worker.pipe.close()
    until = time.monotonic() + _FAREWELL
    for worker in workers:
        worker.process.join(max(0.0, until - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
    for worker in workers:
        worker.process.join(_GRACE)  # one that the kernel holds in a read ends when that does
    workers.clear()


def _work(dataset: Dataset[Any], ring: Ring, pipe: Connection) -> None:
    """Makes items until the pipe ends."""
    leave_signals()
    torch.set_num_threads(1)
    parent = os.getppid()
    while True:
        try:
            while not pipe.poll(_LOOK):
                if os.getppid() != parent:  # killed, while other workers have the end of this pipe too
                    return
            number, slot, size = pipe.recv()
            memory = ring[slot]
            place = pickle.loads(memory[:size].numpy().tobytes())  # noqa: S301  of the process that started this one
            pipe.send((number, _made(dataset, place, Room(memory))))
        except (EOFError, OSError):
            return


def _made(dataset: Dataset[Any], place: Any, room: Room) -> Message:
    try:
        with filling(room):
            return pack(dataset[place], room)
    except Exception as error:  # whatever a data set raises is raised where the item is asked for
        return pack(Raised(error), Room(room.memory))


def leave_signals() -> None:
    """Ctrl-C and SIGTERM reach workers too: they go on, so that the training process can finish its step and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

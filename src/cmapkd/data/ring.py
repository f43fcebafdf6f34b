"""Slots of shared memory through which worker processes hand over what they make, each used again and again."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHARED_MEMORY = "/dev/shm"  # where slots lie
BESIDE = 64 * 2**10  # bytes of a slot for names and numbers beside what is estimated
_ALIGNED = 64  # bytes
_KEPT, _KEPT_FROM = 4, 2**20  # how many blocks of memory are kept for another time, and from how many bytes on


class NoRoom(OSError):
    """A slot could not be had, because the shared memory is full."""


class Ring:
    """Slots of one size in a file of shared memory that has no name, so it goes with the last process that maps it.

    A slot takes memory from when it is first used on. It is asked for, so that full memory is an error here and not the
    death of the process that writes.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots, self.slot_bytes, size = slots, slot_bytes, slots * slot_bytes
        folder = SHARED_MEMORY if Path(SHARED_MEMORY).is_dir() else None
        with tempfile.TemporaryFile(dir=folder) as file:
            self._file = os.dup(file.fileno())
        os.ftruncate(self._file, size)
        self._map(size)
        self._there: set[int] = set()

    def _map(self, size: int) -> None:
        self._size = size
        self._memory = torch.frombuffer(mmap.mmap(self._file, size), dtype=torch.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is being started; the file itself is handed to it."""
        return {"size": self._size, "slot_bytes": self.slot_bytes, "file": reduction.DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.slot_bytes, self._file, self._there = state["slot_bytes"], state["file"].detach(), set()
        self._map(state["size"])

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __getitem__(self, slot: int) -> Tensor:
        """UInt8[slot_bytes]."""
        return self._memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def has(self, slot: int) -> bool:
        """Whether the slot has its memory."""
        return slot in self._there

    def reserve(self, slot: int) -> None:
        """Takes the memory of a slot, if it has none yet.

        Raises:
            NoRoom: the shared memory is full.
        """
        if slot in self._there:
            return
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, slot * self.slot_bytes, self.slot_bytes)
        except OSError as error:
            raise NoRoom(*error.args) from None
        self._there.add(slot)


# ------------------------------------------------------------------------------------------------ in a worker


class Room:
    """A slot that is being filled, from its beginning on."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.used = memory, 0

    def take(self, size: int) -> Tensor | None:
        """UInt8[size] of the slot; None where so much is not left."""
        start = -(-self.used // _ALIGNED) * _ALIGNED
        if start + size > len(self.memory):
            return None
        self.used = start + size
        return self.memory[start : start + size]

    def put(self, data: Tensor) -> tuple[int, int] | bytes:
        """Where UInt8[size] stands in the slot, copied unless it does so already; the bytes where there is no room."""
        if not len(data):
            return b""
        start = data.data_ptr() - self.memory.data_ptr()
        if start >= 0 and start + len(data) <= len(self.memory):
            return start, len(data)
        place = self.take(len(data))
        if place is None:
            return data.numpy().tobytes()
        place.copy_(data)
        return place.data_ptr() - self.memory.data_ptr(), len(data)


_room: Room | None = None  # of this process, a worker


@contextmanager
def filling(room: Room) -> Iterator[None]:
    """What is stacked by `stack` stands in the slot at once."""
    global _room
    _room = room
    try:
        yield
    finally:
        _room = None


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, in a data worker at the place where the result is handed over, so that it is copied once."""
    first = tensors[0]
    place = None if _room is None else _room.take(len(tensors) * first.nbytes)
    if place is None:
        return torch.stack([*tensors])
    whole = place.view(first.dtype).view(len(tensors), *first.shape)
    return torch.stack([*tensors], out=whole)


@dataclass(frozen=True, slots=True)
class Message:
    """What stands where in a slot: the tensors of an object, and the object without them."""

    tensors: list[tuple[int, int] | bytes]
    rest: tuple[int, int] | bytes


class _Packer(pickle.Pickler):
    """Writes dense tensors of the CPU into a slot, each once, and only a mark into the stream."""

    def __init__(self, file: io.BytesIO, room: Room) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.room, self.known = room, dict[int, int]()
        self.kept: list[Tensor] = []  # so that no other object gets the number of one of them
        self.tensors: list[tuple[int, int] | bytes] = []

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.device.type != "cpu" or obj.layout != torch.strided or obj.requires_grad:
            return None
        if id(obj) not in self.known:
            self.known[id(obj)] = len(self.tensors)
            self.kept.append(obj)
            self.tensors.append(self.room.put(obj.contiguous().flatten().view(torch.uint8)))
        return self.known[id(obj)], obj.dtype, tuple(obj.shape)


class Raised:
    """An error that a worker met, and the lines that say where."""

    def __init__(self, error: Exception) -> None:
        self.lines = "".join(traceback.format_exception(error))
        try:
            self.error: Exception = pickle.loads(pickle.dumps(error))  # noqa: S301  its own
        except Exception:  # errors of libraries need not be rebuilt from their arguments
            self.error = RuntimeError(f"{type(error).__name__}: {error}")

    def again(self) -> Exception:
        """The error, to be raised in the main process."""
        self.error.add_note(f"In a data worker:\n{self.lines}")
        return self.error


def pack(made: Any, room: Room) -> Message:
    """Writes an object into a slot. What does not fit is in the message itself."""
    file = io.BytesIO()
    packer = _Packer(file, room)
    packer.dump(made)
    rest = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    return Message(packer.tensors, room.put(rest))


# ------------------------------------------------------------------------------------------------ in the main process


class Blocks:
    """Memory that is used again as soon as no tensor is in it any more: fresh pages cost more than a copy does.

    Args:
        pinned: whether it is page-locked; torch then keeps such memory for the next time by itself.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self._free: list[NDArray[np.uint8]] = []

    def take(self, size: int) -> Tensor:
        """UInt8[size], with any contents."""
        if self.pinned or size < _KEPT_FROM:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        place = next((place for place, block in enumerate(self._free) if len(block) == size), None)
        block = np.empty(size, np.uint8) if place is None else self._free.pop(place)
        lent = block[:]  # the tensor and all that share its memory keep this object
        weakref.finalize(lent, self._back, block).atexit = False
        return torch.from_numpy(lent)

    def _back(self, block: NDArray[np.uint8]) -> None:
        self._free = [block, *self._free[: _KEPT - 1]]


class Landing:
    """Memory for the tensors of `items` objects of one kind, where equal tensors of them lie side by side."""

    def __init__(self, items: int = 1, blocks: Blocks | None = None) -> None:
        self.items, self.blocks = items, blocks or Blocks()
        self._places: dict[int, tuple[Tensor, int]] = {}  # and the bytes used of each

    def take(self, number: int, size: int) -> Tensor:
        """UInt8[size] for tensor `number` of the next object, behind that of the one before if there is room."""
        block, used = self._places.get(number, (None, 0))
        if block is None or used + size > len(block):
            items = self.items if block is None else 1  # this one is of another kind than the first
            block, used = self.blocks.take(items * size), 0
        self._places[number] = block, used + size
        return block[used : used + size]


class _Unpacker(pickle.Unpickler):
    def __init__(self, data: bytes, message: Message, memory: Tensor, landing: Landing) -> None:
        super().__init__(io.BytesIO(data))
        self.message, self.memory, self.landing = message, memory, landing
        self.known: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        number, dtype, shape = pid
        if number not in self.known:
            data = _at(self.message.tensors[number], self.memory)
            place = self.landing.take(number, len(data)).copy_(data)
            self.known[number] = _viewed(place, dtype).view(shape)
        return self.known[number]


def unpack(message: Message, memory: Tensor, landing: Landing | None = None) -> Any:
    """The object that was packed, in memory of its own: nothing of it is in the slot any more."""
    rest = _at(message.rest, memory).numpy().tobytes()
    return _Unpacker(rest, message, memory, landing or Landing()).load()


def _at(place: tuple[int, int] | bytes, memory: Tensor) -> Tensor:
    if isinstance(place, bytes):
        return torch.frombuffer(bytearray(place), dtype=torch.uint8) if place else torch.empty(0, dtype=torch.uint8)
    return memory[place[0] : place[0] + place[1]]


def _viewed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; those that do not begin at a multiple of their size are copied."""
    return data.view(dtype) if data.storage_offset() % dtype.itemsize == 0 else data.clone().view(dtype)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, without a copy of tensors that lie behind each other in one memory."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        alike = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:] and tensor.is_contiguous()
        same_memory = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not alike or not same_memory or tensor.data_ptr() != end:
            return torch.cat([*tensors])
        end += tensor.nbytes
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())

"""Random draws that depend on a key alone, and stay the same in every process and numpy version."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from itertools import chain, count
from typing import Any, TypeVar

import numpy as np

Value = TypeVar("Value")

_BLOCK = 128  # uniforms drawn at a time


class _Engine(threading.local):
    """One Philox generator per thread: setting its key costs a quarter of making a new one."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.generator = np.random.Generator(self.philox)
        self.state: Any = dict(self.philox.state)  # numpy gives its parts no names
        self.state["state"] = {"counter": np.zeros(4, np.uint64), "key": np.zeros(2, np.uint64)}

    def block(self, key: bytes, number: int) -> list[float]:
        inner = self.state["state"]
        inner["key"] = np.frombuffer(key, "<u8")
        inner["counter"][1] = number  # blocks are 2**64 counts apart: they never meet
        self.philox.state = self.state
        uniforms: list[float] = self.generator.random(_BLOCK).tolist()
        return uniforms


_engine = _Engine()


def key_of(*parts: object) -> bytes:
    """The 16-byte key of a tuple of names and numbers."""
    return blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()


class Draws:
    """The uniforms of one key, taken in order; only `Generator.random` is used, whose stream numpy keeps.

    `uniform()` is the next number in [0, 1).
    """

    __slots__ = ("uniform",)

    def __init__(self, key: bytes) -> None:
        self.uniform: Callable[[], float] = chain.from_iterable(map(partial(_engine.block, key), count())).__next__

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def between(self, least: int, most: int) -> int:
        """An integer from `least` to `most`, both possible."""
        return least + int(self.uniform() * (most - least + 1))

    def pick(self, values: Sequence[Value]) -> Value:
        """One of the values, each equally likely."""
        return values[int(self.uniform() * len(values))]

    def some(self, values: Sequence[Value], number: int) -> list[Value]:
        """`number` different places of `values`, in random order."""
        rest = list(values)
        return [rest.pop(int(self.uniform() * len(rest))) for _ in range(min(number, len(rest)))]

"""What the rows of every cache have in common: named arrays of fixed width, and the way from a teacher to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmapkd.cache.config import Store
from cmapkd.data.types import Input
from cmapkd.models import FrozenTeacher

CHECK = "check"  # a row's own number: which sample, view and texts it answers; 0: no answer


class Fidelity(Protocol):
    """Collects over batches how well stored answers stand for live ones."""

    def add(self, live: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
        """Compares decoded arrays [batch ...] by field."""
        ...

    def plain(self) -> dict[str, Any]:
        """What goes into the shard's record."""
        ...


class Layout(ABC):
    """Fixed-width rows of named arrays, packed without gaps. Equal layouts have equal rows for equal answers.

    Attributes:
        store: the type of stored numbers.
    """

    store: Store

    @property
    @abstractmethod
    def needs_texts(self) -> bool:
        """Whether the teacher's own tokens of a batch are read beside its rows."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """A row as numpy reads it."""

    @abstractmethod
    def plain(self) -> dict[str, Any]:
        """The layout as plain data."""

    @abstractmethod
    def describe(self) -> str:
        """One line for people."""

    @property
    @abstractmethod
    def short(self) -> str:
        """A few words for people."""

    @abstractmethod
    def ask(self, teacher: FrozenTeacher, inputs: Any, precision: str) -> dict[str, Tensor]:
        """The live answers to a batch by field, [batch ...]."""

    @abstractmethod
    def encode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Answers in the numbers that are stored. A number that does not fit becomes infinite."""

    @abstractmethod
    def decode(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored arrays in float32, and integers in int64; exact where `store` is fp32."""

    @abstractmethod
    def fidelity(self) -> Fidelity:
        """Compares live answers with stored ones; empty at first."""

    def check_inputs(self, inputs: Any, ids: Sequence[str]) -> None:  # noqa: B027  most layouts have room for any
        """Refuses inputs whose answers have no room in a row.

        Raises:
            CacheError: names the sample.
        """

    @property
    def row_bytes(self) -> int:
        return int(self.dtype.itemsize)

    def rows(self, encoded: Mapping[str, Tensor], checks: NDArray[np.uint64]) -> NDArray[Any]:
        """Rows as numpy records, one for each of `checks`, from arrays [rows ...] of `encode`."""
        rows = np.zeros(len(checks), self.dtype)
        rows[CHECK] = checks
        for name, array in encoded.items():
            rows[name] = array.cpu().numpy()
        return rows

    def tensors(self, rows: NDArray[Any]) -> dict[str, Tensor]:
        """The arrays [rows ...] of numpy records, in the numbers that are stored."""
        return {name: torch.from_numpy(rows[name].copy()) for name in self.dtype.names or () if name != CHECK}


@contextmanager
def as_in_training(device: torch.device, precision: str) -> Iterator[None]:
    """The arithmetic of a training step in this precision, without gradients.

    Without autocast's own cache: entries made here must not be used by a training step.
    """
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        yield


def live_features(teacher: FrozenTeacher, inputs: Input, needs: Any, precision: str) -> Any:
    """The teacher's answers as a training step in this precision would have them."""
    with as_in_training(inputs.texts.ids.device, precision):
        return teacher.model(inputs, needs)

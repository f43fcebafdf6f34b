"""What a batch brings beside pixels and texts, cut to a part of the samples, pinned, and moved; each thing once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def part_of_extra(value: Any, start: int, stop: int, *, size: int, name: str) -> Any:
    """The rows of the samples from `start` to before `stop`.

    Args:
        value: a tensor, an array or a sequence with a row for each sample, a mapping of such, or an object with
            `part(start, stop)`; an object that has a length too must have one row for each sample.
        size: number of samples in the batch.
        name: of the extra, for messages.
    Raises:
        TypeError: the value is none of these.
        ValueError: it does not have one row for each sample.
    """
    if hasattr(value, "part"):
        return value.part(start, stop)
    if isinstance(value, Mapping):
        return {
            key: part_of_extra(each, start, stop, size=size, name=f"{name}[{key!r}]") for key, each in value.items()
        }
    if isinstance(value, Tensor | np.ndarray):
        rows = value.shape[0] if value.ndim else None
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        rows = len(value)
    else:
        raise TypeError(
            f"batch.extra[{name!r}] is of type {type(value).__name__}, which cannot be cut to a part of the samples: "
            "make it a tensor or a sequence with a row for each sample, or give it a method part(start, stop)"
        )
    if rows != size:
        found = "no rows" if rows is None else f"{rows} rows"
        raise ValueError(
            f"batch.extra[{name!r}] has {found} for a batch of {size} samples, so it cannot be cut to a part of them: "
            "give it one row for each sample, or a method part(start, stop)"
        )
    return value[start:stop]


def move_extra(value: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """Tensors, also those inside mappings, and objects with `to(device, non_blocking)`, on `device`; others as is."""
    if isinstance(value, Mapping):
        return {key: move_extra(each, device, non_blocking) for key, each in value.items()}
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    return value.to(device, non_blocking) if hasattr(value, "to") else value


def pin_extra(value: Any) -> Any:
    """Tensors, also those inside mappings, and objects with `pin_memory()`, in page-locked memory; others as is."""
    if isinstance(value, Mapping):
        return {key: pin_extra(each) for key, each in value.items()}
    return value.pin_memory() if hasattr(value, "pin_memory") else value


def once(change: Callable[[T], T]) -> Callable[[T], T]:
    """`change`, made once of each object, however often it is asked for."""
    made: dict[int, T] = {}

    def changed(value: T) -> T:
        if id(value) not in made:
            made[id(value)] = change(value)
        return made[id(value)]

    return changed


def same(tensor: Tensor) -> Tensor:
    """What leaves a tensor as it is."""
    return tensor

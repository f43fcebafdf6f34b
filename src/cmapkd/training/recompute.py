"""Activation checkpointing: blocks that keep their input alone, and compute again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cmapkd.config import ConfigError
from cmapkd.methods import Method, StageConfig
from cmapkd.methods.micro_batches import noted_once
from cmapkd.training.sharding import blocks


def recompute_blocks(method: Method, stages: Sequence[StageConfig] = ()) -> None:
    """Makes the blocks of the student's towers compute again in the backward pass, in place.

    Losses and gradients stay the same: random numbers are drawn again as they were, and batch norms take note of a
    batch once. Names of weights do not change, nor does what a copy of the student computes. Blocks in eval mode, as
    frozen parts are, keep nothing anyway.

    Args:
        stages: of the run.
    Raises:
        ConfigError: the student has no blocks, or the method cannot let them compute again.
    """
    student = method.student
    if (reason := method.why_not_again(stages)) is not None:
        raise ConfigError(f"training.activation_checkpointing does not go with this method as it is set: {reason}")
    found = list(blocks(student))
    if not found:
        raise ConfigError(f"training.activation_checkpointing: {student.name} has no blocks that could compute again")
    for block in found:
        kind: Any = type(block)
        if kind not in _KINDS.values():  # a student that a second trainer gets
            block.__class__ = _recomputed(kind)


_KINDS: dict[type, Any] = {}


def _recomputed(kind: Any) -> Any:
    """The same kind of block under the same name. A class and not a changed method, so that copies have their own."""
    if kind not in _KINDS:
        _KINDS[kind] = _make(kind)
    return _KINDS[kind]


def _make(kind: Any) -> Any:
    class Recomputed(kind):  # type: ignore[misc]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            compute = super().forward
            if not (self.training and torch.is_grad_enabled()):
                return compute(*inputs, **named)
            return checkpoint(compute, *inputs, use_reentrant=False, context_fn=partial(noted_once, self), **named)

    Recomputed.__name__, Recomputed.__qualname__ = kind.__name__, kind.__qualname__
    return Recomputed

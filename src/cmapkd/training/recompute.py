"""Activation checkpointing: blocks that keep their input alone, and compute again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
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
        ConfigError: the student has no blocks, or its weights are exchanged for a forward pass.
    """
    student = method.student
    if method.needs_held_out or any(stage.sparsity is not None for stage in stages):
        raise ConfigError(
            "training.activation_checkpointing computes blocks again with the student's weights, and this method "
            "exchanges them for a forward pass: leave it out"
        )
    found = list(blocks(student))
    if not found:
        raise ConfigError(f"training.activation_checkpointing: {student.name} has no blocks that could compute again")
    for block in found:
        kind: Any = type(block)
        block.__class__ = _recomputed(kind)


@cache
def _recomputed(kind: Any) -> Any:
    """The same kind of block under the same name. A class and not a changed method, so that copies have their own."""

    class Recomputed(kind):  # type: ignore[misc]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            compute = super().forward
            if not (self.training and torch.is_grad_enabled()):
                return compute(*inputs, **named)
            return checkpoint(compute, *inputs, use_reentrant=False, context_fn=partial(noted_once, self), **named)

    Recomputed.__name__, Recomputed.__qualname__ = kind.__name__, kind.__qualname__
    return Recomputed

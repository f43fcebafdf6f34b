"""The measurement that the selection by slopes learns from: held-out pairs, their gradient, slopes along it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from cmapkd.data.types import Batch
from cmapkd.methods.cmapkd.slopes import (
    Columns,
    Direction,
    evaluating,
    gradient,
    norms_of,
    preconditioned,
    slopes_by_difference,
    slopes_forward,
)
from cmapkd.methods.dual import task_loss
from cmapkd.models import DualEncoder, Features, TowerFeatures
from cmapkd.weighting import GradientAlignmentWeighting

_EPS = 1e-8  # of the preconditioner


class Measured(Protocol):
    """What the measurement asks of a method."""

    student: DualEncoder
    second_moment: Callable[[nn.Parameter], Tensor | None]

    def encode_student(self, batch: Batch) -> Features: ...

    def columns(self, batch: Batch) -> Columns: ...


def measure_slopes(method: Measured, weighting: GradientAlignmentWeighting, batch: Batch) -> None:
    """Tells the weighting how fast a step on each item would lower the student's own loss on the held-out pairs.

    All is measured in eval mode, so that neither statistics nor the bank move.

    Raises:
        ValueError: the batch brings no held-out pairs, or nothing of the student learns.
    """
    if batch.held_out is None:
        raise ValueError(
            f"weighting {weighting.config.name} learns from pairs that are never trained on, and this batch brings "
            "none: set data.held_out, or give the trainer's builder held-out pairs (`data.held_out.WithHeldOut`)"
        )
    config, student = weighting.config, method.student
    weighting.by_sample = {}
    if not any(parameter.requires_grad for parameter in student.parameters()):  # a stage may freeze it
        return
    assert isinstance(method, nn.Module)

    def columns() -> Columns:
        return method.columns(batch)

    with evaluating(method), torch.enable_grad():
        directions = directions_of(
            method,
            batch.held_out,
            count=2 if config.by_sample else 1,
            preconditioned_by_optimizer=config.preconditioned,
        )
        if weighting.wants_norms:
            weighting.observe_norms(norms_of(student, columns()))
        slopes = slopes_forward if config.derivative == "forward" else slopes_by_difference
        found = [slopes(student, columns, direction) for direction in directions]
    weighting.observe_slopes({name: torch.stack([each[name].reshape(-1) for each in found]) for name in found[0]})


def directions_of(
    method: Measured, held_out: Batch, *, count: int, preconditioned_by_optimizer: bool
) -> list[Direction]:
    """The gradient of the student's own loss on held-out pairs, as the optimizer would step along it.

    Args:
        count: into how many parts the pairs are divided, each with a direction of its own: every count-th pair of all
            processes, so that the parts are the same in any number of processes.
    """
    student = method.encode_student(held_out)
    losses = [task_loss(_every(student, count, first)) for first in range(count)]
    found = [gradient(loss, method.student, keep=True) for loss in losses]
    if not preconditioned_by_optimizer:
        return found
    return [preconditioned(each, method.student, method.second_moment, eps=_EPS) for each in found]


def _every(features: Features, count: int, first: int) -> Features:
    """Every count-th pair from `first` on, embeddings alone."""
    image, text = (TowerFeatures(tower.embedding[first::count]) for tower in (features.image, features.text))
    pictures = None if features.pictures is None else features.pictures[first::count]
    return replace(features, image=image, text=text, pictures=pictures)

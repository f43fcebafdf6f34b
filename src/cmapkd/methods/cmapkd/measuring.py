"""The measurements that selections of all levels and terms learn from: what a step does for held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.data.types import Batch
from cmapkd.methods.cmapkd.slopes import (
    Columns,
    Direction,
    evaluating,
    gradient,
    gradient_at,
    learning,
    length_of,
    norms_of,
    preconditioned,
    slopes_by_difference,
    slopes_forward,
)
from cmapkd.methods.dual import task_loss
from cmapkd.methods.micro_batches import join_features, micro_batches
from cmapkd.methods.step import StepInfo
from cmapkd.models import DualEncoder, Features, TowerFeatures
from cmapkd.weighting import BanditWeighting, BilevelWeighting, GradientAlignmentWeighting, JointWeighting

_EPS = 1e-6  # of the preconditioner: AdamW's, as `optim.eps` has it by default
_SLOPES = {"forward": slopes_forward, "difference": slopes_by_difference}


class Measured(Protocol):
    """What a measurement asks of a method."""

    student: DualEncoder
    micro_batch: int | None
    second_moment: Callable[[nn.Parameter], Tensor | None]
    step: StepInfo

    def encode_student(self, batch: Batch) -> Features: ...

    def columns(self, batch: Batch) -> Columns: ...


def measure(method: Measured, weighting: JointWeighting, batch: Batch) -> None:
    """Tells the weighting what it learns from, by the student's own loss on the held-out pairs.

    All is measured in eval mode, so that neither statistics nor the bank move.

    Raises:
        ValueError: the batch brings no held-out pairs.
        TypeError: nothing here measures for such a weighting.
    """
    if batch.held_out is None:
        raise ValueError(
            f"weighting {weighting_name(weighting)} learns from pairs that are never trained on, and this batch brings "
            "none: set data.held_out, or give the trainer's builder held-out pairs (`data.held_out.WithHeldOut`)"
        )
    weighting.by_sample = {}  # of another batch
    if not any(parameter.requires_grad for parameter in method.student.parameters()):  # a stage may freeze it
        return
    assert isinstance(method, nn.Module)
    with evaluating(method), torch.enable_grad():
        if isinstance(weighting, GradientAlignmentWeighting):
            measure_slopes(method, weighting, batch, batch.held_out)
        elif isinstance(weighting, BilevelWeighting):
            measure_look_ahead(method, weighting, batch, batch.held_out)
        elif isinstance(weighting, BanditWeighting):
            measure_loss(method, weighting, batch, batch.held_out)
        else:
            raise TypeError(f"nothing measures what a {type(weighting).__name__} learns from")


def weighting_name(weighting: JointWeighting) -> str:
    """As a recipe names it."""
    return str(weighting.Config.model_fields["name"].default)


def measure_slopes(method: Measured, weighting: GradientAlignmentWeighting, batch: Batch, held_out: Batch) -> None:
    """How fast a step on each item would lower the held-out loss."""
    config, student = weighting.config, method.student
    directions = directions_of(
        method,
        held_out,
        count=2 if config.by_sample else 1,
        preconditioned_by_optimizer=config.preconditioned,
    )
    if weighting.wants_norms:
        weighting.observe_norms(norms_of(student, method.columns(batch)))
    slopes = _SLOPES[config.derivative]
    found = [slopes(student, lambda: method.columns(batch), direction) for direction in directions]
    weighting.observe_slopes({name: torch.stack([each[name].reshape(-1) for each in found]) for name in found[0]})


def measure_look_ahead(method: Measured, weighting: BilevelWeighting, batch: Batch, held_out: Batch) -> None:
    """How fast each sample's loss of each item lowers the held-out loss, where one step of the student leads."""
    config, student = weighting.config, method.student
    columns = method.columns(batch)
    if weighting.wants_norms:
        weighting.observe_norms(norms_of(student, columns))
    weights = weighting.weights_for(columns)
    ahead = look_ahead(method, columns, weights, share=config.look_ahead, by_optimizer=config.preconditioned)
    direction = gradient_at(lambda: task_loss(method.encode_student(held_out)), student, ahead)
    if config.preconditioned:
        direction = preconditioned(direction, student, method.second_moment, eps=_EPS)
    slopes = _SLOPES[config.derivative](student, lambda: method.columns(batch), direction)
    weighting.observe_look_ahead(columns, slopes)


def look_ahead(
    method: Measured, columns: Columns, weights: Mapping[str, Tensor], *, share: float, by_optimizer: bool
) -> dict[str, Tensor]:
    """The student's parameters after one step on the weighted losses.

    Args:
        share: length of the step, as a share of the parameters' own length.
        by_optimizer: whether AdamW's root mean squares divide the step.
    """
    student = method.student
    loss = torch.stack([(weights[item].detach() * column).mean() for item, column in columns.items()]).sum()
    step = gradient(loss, student)
    if by_optimizer:
        step = preconditioned(step, student, method.second_moment, eps=_EPS)
    parameters = learning(student)
    rate = share * length_of(parameters) / length_of(step).clamp_min(1e-30)
    return {name: each.detach() - (rate * step[name]).to(each) for name, each in parameters.items()}


def measure_loss(method: Measured, weighting: BanditWeighting, batch: Batch, held_out: Batch) -> None:
    """The held-out loss itself, of pairs that may be many: as many at once as the step itself encodes."""
    if weighting.wants_norms:
        weighting.observe_norms(norms_of(method.student, method.columns(batch)))
    with torch.no_grad():
        parts = micro_batches(held_out, method.micro_batch or len(batch))
        loss: Float[Tensor, ""] = task_loss(join_features([method.encode_student(part) for part in parts]))
    weighting.observe_held_out(loss, generator=method.step.generator("bandit"))


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

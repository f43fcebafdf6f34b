"""One pass over chunks of rows: both losses of each chunk's logits, and their gradients by states and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cmapkd.objectives.tokens import TokenDivergence, by_logits
from cmapkd.objectives.top_tokens import top_measure

Factor = float | Tensor


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a head does beside its product, and the type of this product."""

    scale: float
    softcap: float | None
    dtype: torch.dtype

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Float[Tensor, "rows tokens"]:
        logits = F.linear(hidden.to(self.dtype), weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def bend(self, logits: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens"] | None:
        """The derivative of the cap; None where there is none."""
        return None if self.softcap is None else logits.div(self.softcap).square_().neg_().add_(1)

    def through(self, slopes: Float[Tensor, "rows tokens"], bend: Tensor | None) -> Float[Tensor, "rows tokens"]:
        """From derivatives by the logits, which are overwritten, to those by the product."""
        if bend is not None:
            slopes.mul_(bend)
        return slopes if self.scale == 1 else slopes.mul_(self.scale)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is no tensor. `declared` is None where no gradient is formed in the forward pass."""

    head: HeadShape
    teacher: HeadShape | None
    divergence: TokenDivergence | None
    chunk: int
    declared: tuple[float, float] | None
    differentiable: bool


class _Top(NamedTuple):
    ids: Tensor
    log_p: Tensor
    rest: Tensor


class Tensors(NamedTuple):
    """The student's states and head, what stands in the rows, and three tensors of the teacher."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    row_weights: Tensor | None
    teacher: tuple[Tensor | None, ...]


class Gradients(NamedTuple):
    """By states, weight and bias; None where nobody asks."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


NO_GRADIENTS = Gradients(None, None, None)


def in_chunks(
    plan: Plan, given: Tensors, factors: tuple[float, float] | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Gradients]:
    """Both sums, and the gradients of `factors[0] * ce + factors[1] * kd`, where they are given and wanted."""
    dtype = torch.promote_types(plan.head.dtype, torch.float32)
    weight = given.weight.to(plan.head.dtype)
    bias = None if given.bias is None else given.bias.to(plan.head.dtype)
    gradients = NO_GRADIENTS if factors is None else _zeros(given, wanted, dtype)
    sums = torch.zeros(2, dtype=dtype, device=given.hidden.device)
    compare = _comparison(plan, given)
    for here in _slices(len(given.hidden), plan.chunk):
        logits = plan.head.logits(given.hidden[here], weight, bias)
        bend = None if factors is None else plan.head.bend(logits)
        row_weights = None if given.row_weights is None else given.row_weights[:, here].to(dtype)
        of_teacher = None if compare is None else partial(compare, here)
        rows, slopes = _of_logits(plan, logits, given.targets[here], of_teacher, _by_row(factors, row_weights))
        sums += (rows if row_weights is None else rows * row_weights).sum(-1)
        if slopes is not None and any(wanted):
            _add(gradients, plan.head.through(slopes, bend), here, given.hidden[here].to(weight.dtype), weight)
        del logits, bend, slopes  # before those of the next chunk
    ce, kd = sums.unbind()
    return ce.clone(), kd.clone(), _like_inputs(gradients, given)


def _of_logits(
    plan: Plan,
    logits: Float[Tensor, "rows tokens"],
    targets: Int[Tensor, " rows"],
    compare: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    factors: tuple[Factor, Factor] | None,
) -> tuple[Float[Tensor, "2 rows"], Float[Tensor, "rows tokens"] | None]:
    """Both losses of each row, and the derivatives of their weighted sum by the logits, which are overwritten."""
    how, chosen = plan.divergence, targets[:, None].long()
    soft = None if how is None or how.temperature == 1 else how.log_softmax(logits)
    log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
    ce = -log_q.gather(-1, chosen)[:, 0]
    kd, slopes = torch.zeros_like(ce), None
    if compare is not None and how is not None:
        temperature = how.temperature
        kd, slopes = compare(log_q if soft is None else soft)
        kd = kd * temperature**2
        slopes = None if factors is None else slopes.mul_(factors[1]).mul_(temperature)
    if factors is not None:
        q = log_q.exp_().mul_(factors[0])
        slopes = q if slopes is None else slopes.add_(q)
        slopes.scatter_add_(-1, chosen, slopes.new_ones(chosen.shape).mul_(factors[0]).neg_())
    return torch.stack([ce, kd]), slopes


def _by_row(
    factors: tuple[float, float] | None, row_weights: Float[Tensor, "2 rows"] | None
) -> tuple[Factor, Factor] | None:
    """The factor of each row in the derivatives, [rows 1], or one for all."""
    if factors is None or row_weights is None:
        return factors
    return factors[0] * row_weights[0][:, None], factors[1] * row_weights[1][:, None]


def _comparison(plan: Plan, given: Tensors) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]] | None:
    """Of rows and the student's log-probabilities: their divergence, and its gradient by logits at temperature 1."""
    how = plan.divergence
    if how is None:
        return None
    if plan.teacher is None:
        top = cast(tuple[Tensor, Tensor, Tensor], given.teacher)
        return lambda here, log_q: top_measure(how, log_q, _Top(*(one[here] for one in top)))
    shape, (hidden, head_weight, head_bias) = plan.teacher, given.teacher
    assert hidden is not None
    assert head_weight is not None
    weight = head_weight.to(shape.dtype)
    bias = None if head_bias is None else head_bias.to(shape.dtype)

    def compare(here: slice, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_p = how.log_softmax(shape.logits(hidden[here], weight, bias)).to(log_q.dtype)
        values, slopes = how.measure(log_q, log_p, given.targets[here])
        return values, by_logits(slopes, log_q)

    return compare


def _add(gradients: Gradients, slopes: Tensor, here: slice, hidden: Tensor, weight: Tensor) -> None:
    """Adds what comes from the derivatives by the products of some rows."""
    if gradients.bias is not None:
        gradients.bias.add_(slopes.sum(0))
    slopes = slopes.to(weight.dtype)
    if gradients.hidden is not None:
        gradients.hidden[here] = slopes @ weight
    if gradients.weight is not None:
        if gradients.weight.dtype == weight.dtype:
            gradients.weight.addmm_(slopes.T, hidden)
        else:  # a sum in half precision over many chunks would lose its small parts
            gradients.weight.add_(slopes.T @ hidden)


def _zeros(given: Tensors, wanted: tuple[bool, ...], dtype: torch.dtype) -> Gradients:
    inputs = (given.hidden, given.weight, given.bias)
    return Gradients(
        *(
            torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
            if is_wanted and tensor is not None
            else None
            for tensor, is_wanted in zip(inputs, wanted, strict=True)
        )
    )


def _like_inputs(gradients: Gradients, given: Tensors) -> Gradients:
    """In the types of what they are gradients of."""
    inputs = (given.hidden, given.weight, given.bias)
    return Gradients(
        *(
            None if one is None or tensor is None else one.to(tensor.dtype)
            for one, tensor in zip(gradients, inputs, strict=True)
        )
    )


def _slices(num_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def tensors_given(tensors: tuple[Tensor | None, ...]) -> Tensors:
    hidden, weight, bias, targets, row_weights, *teacher = tensors
    assert hidden is not None
    assert weight is not None
    assert targets is not None
    return Tensors(hidden, weight, bias, targets, row_weights, tuple(teacher))

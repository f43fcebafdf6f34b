"""One pass over chunks of rows: both losses of each chunk's logits, and their gradients by states and head.

The products with a head are of whole chunks, into memory that all chunks share. On a CPU, sums over tokens are taken a
few rows at a time, because fresh memory of a chunk's size costs more time than the sums themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.tokens import TokenDivergence
from cmapkd.objectives.top_tokens import top_measure

Factor = float | Tensor

BLOCK_LOGITS = 2**18
"""Logits of which a CPU takes sums at a time, but at least a row: 1 MiB of float32, which its cache holds."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a head does beside its product, and the type of this product."""

    scale: float
    softcap: float | None
    dtype: torch.dtype

    def logits(self, products: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens"]:
        """float32 or wider; products that are so already are overwritten."""
        logits = products.to(torch.promote_types(products.dtype, torch.float32))
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


class Compared(NamedTuple):
    """The divergence of some rows. Its gradient by the student's logits at temperature 1 is `dense` - `totals` q.

    Attributes:
        values: Float[rows] in nats.
        dense: Float[rows tokens], which may be overwritten.
        totals: Float[rows 1].
    """

    values: Tensor
    dense: Tensor
    totals: Tensor


class _Teacher(Protocol):
    def turn_to(self, here: slice) -> None:
        """The rows of a chunk."""
        ...

    def compare(self, some: slice, log_q: Tensor, targets: Tensor) -> Compared:
        """With some rows of the chunk: the student's log-probabilities, and the tokens that stand there."""
        ...


def in_chunks(
    plan: Plan, given: Tensors, factors: tuple[float, float] | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Gradients]:
    """Both sums, and the gradients of `factors[0] * ce + factors[1] * kd`, where they are given and wanted."""
    dtype = torch.promote_types(plan.head.dtype, torch.float32)
    student = _Products(plan.head, given.hidden, given.weight, given.bias, plan.chunk)
    teacher = _teacher(plan, given)
    gradients = NO_GRADIENTS if factors is None else _zeros(given, wanted, dtype)
    sums = torch.zeros(2, dtype=dtype, device=given.hidden.device)
    block = plan.chunk if sums.device.type != "cpu" else max(1, BLOCK_LOGITS // len(given.weight))
    for here in _slices(len(given.hidden), plan.chunk):
        products, targets = student(here), given.targets[here]
        row_weights = None if given.row_weights is None else given.row_weights[:, here].to(dtype)
        if teacher is not None:
            teacher.turn_to(here)
        found = []
        for some in _slices(len(products), block):
            by_row = None if row_weights is None else row_weights[:, some]
            compare = None if teacher is None else partial(teacher.compare, some, targets=targets[some])
            rows = _of_products(plan, products[some], targets[some], compare, _by_row(factors, by_row), gradients.bias)
            found.append(rows if by_row is None else rows * by_row)
        sums += torch.cat(found, -1).sum(-1)
        if factors is not None and any(wanted):
            _add(gradients, products, here, given.hidden[here].to(products.dtype), student.weight)
    ce, kd = sums.unbind()
    return ce.clone(), kd.clone(), _like_inputs(gradients, given)


def _of_products(
    plan: Plan,
    products: Float[Tensor, "rows tokens"],
    targets: Int[Tensor, " rows"],
    compare: Callable[[Tensor], Compared] | None,
    factors: tuple[Factor, Factor] | None,
    bias: Float[Tensor, " tokens"] | None,
) -> Float[Tensor, "2 rows"]:
    """Both losses of each row. With factors, products become derivatives of their weighted sum by the products.

    The gradient by the head's bias is added to `bias`.
    """
    logits = plan.head.logits(products)
    bend = None if factors is None else plan.head.bend(logits)
    rows, slopes = _of_logits(plan.divergence, logits, targets, compare, factors)
    if slopes is not None:
        slopes = plan.head.through(slopes, bend)
        if bias is not None:
            bias.add_(slopes.sum(0))
        products.copy_(slopes)
    return rows


def _of_logits(
    how: TokenDivergence | None,
    logits: Float[Tensor, "rows tokens"],
    targets: Int[Tensor, " rows"],
    compare: Callable[[Tensor], Compared] | None,
    factors: tuple[Factor, Factor] | None,
) -> tuple[Float[Tensor, "2 rows"], Float[Tensor, "rows tokens"] | None]:
    """Both losses of each row, and the derivatives of their weighted sum by the logits, which are overwritten."""
    chosen = targets[:, None].long()
    soft = None if how is None or how.temperature == 1 else how.log_softmax(logits)
    log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
    ce = -log_q.gather(-1, chosen)[:, 0]
    if compare is None or how is None:
        kd, slopes = torch.zeros_like(ce), None if factors is None else log_q.exp_().mul_(factors[0])
    else:
        found = compare(log_q if soft is None else soft)
        kd = found.values * how.temperature**2
        slopes = None if factors is None else _slopes(found, log_q, soft, factors[0], factors[1] * how.temperature)
    if factors is not None and slopes is not None:
        slopes.scatter_add_(-1, chosen, slopes.new_ones(chosen.shape).mul_(factors[0]).neg_())
    return torch.stack([ce, kd]), slopes


def _slopes(
    found: Compared, log_q: Float[Tensor, "rows tokens"], soft: Tensor | None, hard_factor: Factor, soft_factor: Factor
) -> Float[Tensor, "rows tokens"]:
    """`hard_factor` times q, which is that of the logits, and the divergence's gradient; overwrites all.

    Args:
        soft: log-probabilities that the divergence read; None: `log_q`.
    """
    slopes, totals = found.dense.mul_(soft_factor), found.totals * soft_factor
    if soft is None:
        return slopes.addcmul_(log_q.exp_(), hard_factor - totals)
    return slopes.addcmul_(soft.exp_(), totals, value=-1).add_(log_q.exp_().mul_(hard_factor))


def _by_row(
    factors: tuple[float, float] | None, row_weights: Float[Tensor, "2 rows"] | None
) -> tuple[Factor, Factor] | None:
    """The factor of each row in the derivatives, [rows 1], or one for all."""
    if factors is None or row_weights is None:
        return factors
    return factors[0] * row_weights[0][:, None], factors[1] * row_weights[1][:, None]


class _Products:
    """A head's products with states, those of a chunk in place of those of the chunk before."""

    def __init__(self, head: HeadShape, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> None:
        self.hidden, self.weight = hidden, weight.to(head.dtype)
        self._bias = None if bias is None else bias.to(head.dtype)
        self._space = self.weight.new_empty(min(chunk, len(hidden)), len(weight))

    def __call__(self, here: slice) -> Float[Tensor, "rows tokens"]:
        hidden = self.hidden[here].to(self.weight.dtype)
        space = self._space[: len(hidden)]
        if self._bias is None:
            return torch.mm(hidden, self.weight.T, out=space)
        return torch.addmm(self._bias, hidden, self.weight.T, out=space)


class _Live:
    """A teacher with states and a head."""

    def __init__(self, how: TokenDivergence, head: HeadShape, tensors: tuple[Tensor | None, ...], chunk: int) -> None:
        hidden, weight, bias = tensors
        assert hidden is not None
        assert weight is not None
        self._how, self._head = how, head
        self._of, self._products = _Products(head, hidden, weight, bias, chunk), torch.empty(0)

    def turn_to(self, here: slice) -> None:
        self._products = self._of(here)

    def compare(self, some: slice, log_q: Tensor, targets: Tensor) -> Compared:
        log_p = self._how.log_softmax(self._head.logits(self._products[some])).to(log_q.dtype)
        values, slopes = self._how.measure(log_q, log_p, targets)
        return Compared(values, slopes, slopes.sum(-1, keepdim=True))


class _Stored:
    """A teacher that is known by its likeliest tokens."""

    def __init__(self, how: TokenDivergence, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        self._how, self._all, self._here = how, tensors, slice(0)

    def turn_to(self, here: slice) -> None:
        self._here = here

    def compare(self, some: slice, log_q: Tensor, targets: Tensor) -> Compared:  # noqa: ARG002
        return Compared(*top_measure(self._how, log_q, _Top(*(one[self._here][some] for one in self._all))))


def _teacher(plan: Plan, given: Tensors) -> _Teacher | None:
    if plan.divergence is None:
        return None
    if plan.teacher is None:
        return _Stored(plan.divergence, cast(tuple[Tensor, Tensor, Tensor], given.teacher))
    return _Live(plan.divergence, plan.teacher, given.teacher, plan.chunk)


def _add(gradients: Gradients, slopes: Tensor, here: slice, hidden: Tensor, weight: Tensor) -> None:
    """Adds what comes from the derivatives by the products of some rows, but for the bias."""
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

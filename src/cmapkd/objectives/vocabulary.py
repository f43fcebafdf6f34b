"""Losses over a whole vocabulary, a few rows at a time: the logits of a chunk never outlive it.

Logits of 4,096 rows over 151,936 tokens are 2.5 GB, and a loss with its gradient makes several such tensors of each
model. Here gradients are written out, so that a chunk of rows is all that exists at a time. The gradients of the whole
are formed in the same pass where the terms' weights are known beforehand, as Liger-Kernel does; else in a second one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cmapkd.objectives.tokens import TokenDivergence, by_logits
from cmapkd.objectives.top_tokens import Likeliest, check_top, top_measure

CHUNK_LOGITS, CHUNK_ROWS = 2**24, 128
"""64 MiB of float32 at a time, but never so few rows that reading the head takes longer than the product."""


class Head(Protocol):
    """From final states to logits (`models.token_types.LogitHead`)."""

    @property
    def weight(self) -> Float[Tensor, "size width"]: ...
    @property
    def bias(self) -> Float[Tensor, " size"] | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...


class TokenLosses(NamedTuple):
    """Sums over rows, in nats.

    Attributes:
        ce: of -log q of the targets, the student's softmax at temperature 1.
        kd: of the divergence from the teacher; None without a teacher.
    """

    ce: Float[Tensor, ""]
    kd: Float[Tensor, ""] | None


def token_losses(
    hidden: Float[Tensor, "rows width"],
    head: Head,
    targets: Int[Tensor, " rows"],
    *,
    teacher: tuple[Float[Tensor, "rows teacher_width"], Head] | Likeliest | None = None,
    divergence: TokenDivergence | None = None,
    row_weights: Float[Tensor, " rows"] | None = None,
    declared: tuple[float, float] | None = (1.0, 1.0),
    chunk: int | None = None,
) -> TokenLosses:
    """Cross-entropy with the targets and divergence from a teacher: two sums over rows, to be divided by their count.

    Both can be differentiated once, by the student's states and by weight and bias of its head. Values and gradients
    do not depend on `chunk` and `declared`, up to rounding.

    Args:
        hidden: row i predicts `targets[i]`; in half precision, or under autocast, the head's product is in it.
        targets: tokens, 0 to size - 1.
        teacher: final states and head, over the same tokens, or its likeliest tokens at the divergence's temperature.
            It gets no gradient.
        divergence: is needed with a teacher, and refused without one.
        row_weights: of each row in both sums; they get no gradient. None: 1.
        declared: (weight of ce, weight of kd) in the loss that will be differentiated, up to a common factor. Then its
            gradient is formed in the forward pass. Other gradients stay right, by a second pass, as does each backward
            pass after the first. None: always by a second pass; better within `checkpoint` and for learned weights.
        chunk: rows at a time; None: 64 MiB of logits, but at least 128 rows.
    Returns:
        float32, or float64 of float64 states.
    Raises:
        ValueError: the shapes do not fit each other, a target is no token, or a teacher and a divergence do not both
            stand there.
        RuntimeError: the result is differentiated twice.
    Source: the chunked form of Liger-Kernel, arXiv:2410.10989, section 3.2.
    """
    _check(hidden, head, targets, teacher, divergence, row_weights)
    learning = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, head.weight, head.bias)
    )
    plan = _Plan(
        head=_Shape(head.scale, head.softcap, _product_dtype(hidden)),
        teacher=None if not isinstance(teacher, tuple) else _shape_of(*teacher),
        divergence=divergence,
        chunk=chunk_of_tokens(len(hidden), len(head.weight), chunk),
        declared=None if not learning or declared is None else _counted(declared, divergence),
        differentiable=learning,
    )
    weights = None if row_weights is None else row_weights.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        ce, kd = _TokenLosses.apply(plan, hidden, head.weight, head.bias, targets, weights, *_tensors_of(teacher))
    return TokenLosses(ce, None if divergence is None else kd)


def chunk_of_tokens(num_rows: int, num_tokens: int, chunk: int | None) -> int:
    """Rows to take at a time: `chunk`, or for None 2^24 logits (64 MiB in float32), but at least 128 rows.

    Raises:
        ValueError: the chunk is not positive.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least one row, got {chunk}; None chooses by the size of the vocabulary")
    return max(1, min(num_rows, chunk or max(CHUNK_ROWS, CHUNK_LOGITS // num_tokens)))


@dataclass(frozen=True, slots=True)
class _Shape:
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
class _Plan:
    """All that is no tensor. `declared` is None where no gradient is formed in the forward pass."""

    head: _Shape
    teacher: _Shape | None
    divergence: TokenDivergence | None
    chunk: int
    declared: tuple[float, float] | None
    differentiable: bool


class _Top(NamedTuple):
    ids: Tensor
    log_p: Tensor
    rest: Tensor


class _Tensors(NamedTuple):
    """The student's states and head, what stands in the rows, and three tensors of the teacher."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    row_weights: Tensor | None
    teacher: tuple[Tensor | None, ...]


class _Gradients(NamedTuple):
    """By states, weight and bias; None where nobody asks."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


_NONE = _Gradients(None, None, None)


class _TokenLosses(torch.autograd.Function):
    """`token_losses` with its gradient written out, formed in the forward pass for declared weights."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        given = _given(tensors)
        wanted = tuple(ctx.needs_input_grad[1:4])
        ce, kd, gradients = _in_chunks(plan, given, plan.declared, wanted)
        if plan.differentiable:
            # Saved and not held by ctx, so that `checkpoint` drops them after its first pass.
            ctx.save_for_backward(*tensors, *gradients)
            ctx.plan, ctx.spent = plan, plan.declared is None
        return ce, kd

    @staticmethod
    def backward(ctx: Any, of_ce: Tensor, of_kd: Tensor) -> Any:
        saved, again = ctx.saved_tensors, torch.is_grad_enabled()
        with torch.no_grad():
            gradients = _TokenLosses._gradients(ctx, saved, of_ce, of_kd)
        if again:  # somebody may differentiate the gradients, which is refused there
            depends = (of_ce, of_kd, *saved[:3])
            gradients = _Gradients(*(None if one is None else _Once.apply(one, *depends) for one in gradients))
        return (None, *gradients, *(None for _ in saved[3:-3]))

    @staticmethod
    def _gradients(ctx: Any, saved: tuple[Tensor | None, ...], of_ce: Tensor, of_kd: Tensor) -> _Gradients:
        plan, upstream = ctx.plan, (float(of_ce), float(of_kd))
        factor = None if ctx.spent else _common_factor(plan, upstream, of_ce.dtype)
        if factor is None:
            asked = plan if upstream[1] else replace(plan, divergence=None)
            return _in_chunks(asked, _given(saved[:-3]), upstream, tuple(ctx.needs_input_grad[1:4]))[2]
        # Given away in place: a copy of the head's gradient would be as large as the head. A second backward pass
        # forms its own. `data` has no version counter in common with the saved tensor, which that pass must skip.
        ctx.spent = True
        return _Gradients(*(None if one is None else one.data.mul_(factor) for one in saved[-3:]))


class _Once(torch.autograd.Function):
    """A gradient that must not be differentiated: autograd would take it for a constant, without a word."""

    @staticmethod
    def forward(_: Any, gradient: Tensor, *__: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_: Any, *__: Tensor) -> Any:
        raise RuntimeError(
            "token_losses can be differentiated once, and its gradient was to be differentiated again. For a second "
            "derivative, take the divergence of materialised logits: TokenDivergence(...)(student, teacher)."
        )


def _in_chunks(
    plan: _Plan, given: _Tensors, factors: tuple[float, float] | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, _Gradients]:
    """Both sums, and the gradients of `factors[0] * ce + factors[1] * kd`, where they are given and wanted."""
    dtype = torch.promote_types(plan.head.dtype, torch.float32)
    weight = given.weight.to(plan.head.dtype)
    bias = None if given.bias is None else given.bias.to(plan.head.dtype)
    gradients = _NONE if factors is None else _zeros(given, wanted, dtype)
    sums = torch.zeros(2, dtype=dtype, device=given.hidden.device)
    compare = _comparison(plan, given)
    for here in _slices(len(given.hidden), plan.chunk):
        logits = plan.head.logits(given.hidden[here], weight, bias)
        bend = None if factors is None else plan.head.bend(logits)
        row_weights = None if given.row_weights is None else given.row_weights[here].to(dtype)
        of_teacher = None if compare is None else partial(compare, here)
        rows, slopes = _of_logits(plan, logits, given.targets[here], of_teacher, factors)
        sums += (rows if row_weights is None else rows * row_weights).sum(-1)
        if slopes is not None and any(wanted):
            if row_weights is not None:
                slopes.mul_(row_weights[:, None])
            _add(gradients, plan.head.through(slopes, bend), here, given.hidden[here].to(weight.dtype), weight)
        del logits, bend, slopes  # before those of the next chunk
    ce, kd = sums.unbind()
    return ce.clone(), kd.clone(), _like_inputs(gradients, given)


def _of_logits(
    plan: _Plan,
    logits: Float[Tensor, "rows tokens"],
    targets: Int[Tensor, " rows"],
    compare: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    factors: tuple[float, float] | None,
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
        slopes = None if factors is None else slopes.mul_(factors[1] * temperature)
    if factors is not None:
        q = log_q.exp_().mul_(factors[0])
        slopes = q if slopes is None else slopes.add_(q)
        slopes.scatter_add_(-1, chosen, slopes.new_full(chosen.shape, -factors[0]))
    return torch.stack([ce, kd]), slopes


def _comparison(plan: _Plan, given: _Tensors) -> Callable[[slice, Tensor], tuple[Tensor, Tensor]] | None:
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


def _add(gradients: _Gradients, slopes: Tensor, here: slice, hidden: Tensor, weight: Tensor) -> None:
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


def _zeros(given: _Tensors, wanted: tuple[bool, ...], dtype: torch.dtype) -> _Gradients:
    inputs = (given.hidden, given.weight, given.bias)
    return _Gradients(
        *(
            torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
            if is_wanted and tensor is not None
            else None
            for tensor, is_wanted in zip(inputs, wanted, strict=True)
        )
    )


def _like_inputs(gradients: _Gradients, given: _Tensors) -> _Gradients:
    """In the types of what they are gradients of."""
    inputs = (given.hidden, given.weight, given.bias)
    return _Gradients(
        *(
            None if one is None or tensor is None else one.to(tensor.dtype)
            for one, tensor in zip(gradients, inputs, strict=True)
        )
    )


def _common_factor(plan: _Plan, upstream: tuple[float, float], dtype: torch.dtype) -> float | None:
    """By which the gradient of the declared loss is that of this one; None: by none."""
    declared = plan.declared
    assert declared is not None
    along = sum(one * other for one, other in zip(upstream, declared, strict=True))
    factor = along / sum(one * one for one in declared)
    within = 8 * torch.finfo(dtype).eps * max(map(abs, upstream))
    fits = all(abs(one - factor * other) <= within for one, other in zip(upstream, declared, strict=True))
    return factor if fits else None


def _counted(declared: tuple[float, float], divergence: TokenDivergence | None) -> tuple[float, float] | None:
    """The weights of the losses that there are; None where all are zero."""
    weights = (declared[0], 0.0 if divergence is None else declared[1])
    return weights if any(weights) else None


def _slices(num_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The type of the head's product: autocast's, where it would take it."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _shape_of(hidden: Tensor, head: Head) -> _Shape:
    return _Shape(head.scale, head.softcap, _product_dtype(hidden))


def _tensors_of(teacher: tuple[Tensor, Head] | Likeliest | None) -> tuple[Tensor | None, ...]:
    if teacher is None:
        return None, None, None
    if isinstance(teacher, tuple):
        hidden, head = teacher
        return hidden.detach(), head.weight.detach(), None if head.bias is None else head.bias.detach()
    return teacher.ids, teacher.log_p.detach(), teacher.rest.detach()


def _given(tensors: tuple[Tensor | None, ...]) -> _Tensors:
    hidden, weight, bias, targets, row_weights, *teacher = tensors
    assert hidden is not None
    assert weight is not None
    assert targets is not None
    return _Tensors(hidden, weight, bias, targets, row_weights, tuple(teacher))


def _check(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    teacher: tuple[Tensor, Head] | Likeliest | None,
    divergence: TokenDivergence | None,
    row_weights: Tensor | None,
) -> None:
    num_rows, num_tokens = len(hidden), len(head.weight)
    _check_head("student", hidden, head)
    if targets.shape != (num_rows,) or (row_weights is not None and row_weights.shape != (num_rows,)):
        weighed = None if row_weights is None else tuple(row_weights.shape)
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and row_weights {weighed}, but there are {num_rows} rows of "
            "hidden states: give one target, and one weight or none, for each row"
        )
    if num_rows and not 0 <= int(targets.min()) <= int(targets.max()) < num_tokens:
        raise ValueError(
            f"targets are from {int(targets.min())} to {int(targets.max())}, but the head has tokens 0 to "
            f"{num_tokens - 1}: leave out rows without a target (-100), and take both models' tokens from one tokenizer"
        )
    if (teacher is None) != (divergence is None):
        raise ValueError(f"teacher is {type(teacher).__name__} and divergence {divergence}: give both or neither")
    if isinstance(teacher, tuple):
        _check_head("teacher", *teacher)
        if len(teacher[0]) != num_rows or len(teacher[1].weight) != num_tokens:
            raise ValueError(
                f"the teacher has {len(teacher[0])} rows and {len(teacher[1].weight)} tokens, but the student "
                f"{num_rows} and {num_tokens}: give both models the same answers, and cut both heads to the tokens "
                "that they share"
            )
    elif teacher is not None and divergence is not None:
        check_top(teacher, divergence, num_rows, num_tokens)


def _check_head(who: str, hidden: Tensor, head: Head) -> None:
    size, width = head.weight.shape
    if hidden.ndim != 2 or hidden.shape[1] != width or (head.bias is not None and head.bias.shape != (size,)):
        bias = None if head.bias is None else tuple(head.bias.shape)
        raise ValueError(
            f"the {who}'s hidden states have shape {tuple(hidden.shape)}, but its head {tuple(head.weight.shape)} with "
            f"bias {bias}: give [rows, {width}] and a bias of {size} or None"
        )

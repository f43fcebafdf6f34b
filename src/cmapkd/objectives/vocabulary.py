"""Losses over a whole vocabulary, a few rows at a time: the logits of a chunk never outlive it.

Logits of 4,096 rows over 151,936 tokens are 2.5 GB, and a loss with its gradient makes several such tensors of each
model. Here gradients are written out, so that a chunk of rows is all that exists at a time. The gradients of the whole
are formed in the same pass where the terms' weights are known beforehand, as Liger-Kernel does; else in a second one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.derivatives import refusing
from cmapkd.objectives.tokens import TokenDivergence
from cmapkd.objectives.top_tokens import Likeliest, check_top
from cmapkd.objectives.vocabulary_pass import Gradients, HeadShape, Plan, in_chunks, tensors_given

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
    row_weights: Float[Tensor, " rows"] | Float[Tensor, "2 rows"] | None = None,
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
        row_weights: of each row in both sums, or in the one and in the other; they get no gradient. None: 1.
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
    plan = Plan(
        head=HeadShape(head.scale, head.softcap, _product_dtype(hidden)),
        teacher=None if not isinstance(teacher, tuple) else _shape_of(*teacher),
        divergence=divergence,
        chunk=chunk_of_tokens(len(hidden), len(head.weight), chunk),
        declared=None if not learning or declared is None else _counted(declared, divergence),
        differentiable=learning,
    )
    weights = None if row_weights is None else row_weights.detach().expand(2, -1)
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


_NO_SECOND = (
    "token_losses can be differentiated once, and its gradient was to be differentiated again. For a second "
    "derivative, take the divergence of materialised logits: TokenDivergence(...)(student, teacher)."
)


class _TokenLosses(torch.autograd.Function):
    """`token_losses` with its gradient written out, formed in the forward pass for declared weights."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        given = tensors_given(tensors)
        wanted = tuple(ctx.needs_input_grad[1:4])
        ce, kd, gradients = in_chunks(plan, given, plan.declared, wanted)
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
            gradients = Gradients(*refusing(gradients, (of_ce, of_kd, *saved[:3]), _NO_SECOND))
        return (None, *gradients, *(None for _ in saved[3:-3]))

    @staticmethod
    def _gradients(ctx: Any, saved: tuple[Tensor | None, ...], of_ce: Tensor, of_kd: Tensor) -> Gradients:
        plan, upstream = ctx.plan, (float(of_ce.detach()), float(of_kd.detach()))
        factor = None if ctx.spent else _common_factor(plan, upstream, of_ce.dtype)
        if factor is None:
            asked = plan if upstream[1] else replace(plan, divergence=None)
            return in_chunks(asked, tensors_given(saved[:-3]), upstream, tuple(ctx.needs_input_grad[1:4]))[2]
        # Given away in place: a copy of the head's gradient would be as large as the head. A second backward pass
        # forms its own. `data` has no version counter in common with the saved tensor, which that pass must skip.
        ctx.spent = True
        return Gradients(*(None if one is None else one.data.mul_(factor) for one in saved[-3:]))


def _common_factor(plan: Plan, upstream: tuple[float, float], dtype: torch.dtype) -> float | None:
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


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The type of the head's product: autocast's, where it would take it."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _shape_of(hidden: Tensor, head: Head) -> HeadShape:
    return HeadShape(head.scale, head.softcap, _product_dtype(hidden))


def _tensors_of(teacher: tuple[Tensor, Head] | Likeliest | None) -> tuple[Tensor | None, ...]:
    if teacher is None:
        return None, None, None
    if isinstance(teacher, tuple):
        hidden, head = teacher
        return hidden.detach(), head.weight.detach(), None if head.bias is None else head.bias.detach()
    return teacher.ids, teacher.log_p.detach(), teacher.rest.detach()


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
    fitting = ((num_rows,), (2, num_rows))
    if targets.shape != (num_rows,) or (row_weights is not None and row_weights.shape not in fitting):
        weighed = None if row_weights is None else tuple(row_weights.shape)
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and row_weights {weighed}, but there are {num_rows} rows of "
            "hidden states: give one target, and one weight, two or none, for each row"
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

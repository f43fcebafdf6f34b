"""Gradients that are written out for a first derivative: a second one through them is refused, not silently wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
_NO_SECOND = (
    "the gradient of this loss is written out and was to be differentiated again. In-batch losses have second "
    "derivatives up to 2,048 pairs in one process, or with a chunk of the whole batch. A bank's divergence has none."
)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Gradients]:
    """For the `backward` of an autograd function whose saved tensors include all inputs that have a gradient.

    torch's `once_differentiable` raises only where the gradient from above has a gradient itself. Where that is a
    constant, second derivatives would silently lack those through the saved tensors.

    Raises (when the gradients are differentiated):
        RuntimeError: says what to do.
    """

    @wraps(backward)
    def once(ctx: Any, *given: Tensor) -> Gradients:
        with torch.no_grad():
            found = backward(ctx, *given)
        if not torch.is_grad_enabled():  # it is where a graph of the gradients is asked for
            return tuple(found)
        return refusing(found, (*given, *ctx.saved_tensors), _NO_SECOND)

    return once


def refusing(gradients: Iterable[Tensor | None], depends: Iterable[Tensor | None], message: str) -> Gradients:
    """The gradients, of which each raises when somebody differentiates it by anything that it depends on.

    Args:
        depends: all tensors that the gradients are functions of.
        message: of the RuntimeError.
    """
    on = [each for each in depends if each is not None]
    return tuple(None if each is None else _Refusing.apply(each, message, *on) for each in gradients)


class _Refusing(torch.autograd.Function):
    """Autograd would take the gradient for a constant, without a word."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, message: str, *_: Tensor) -> Tensor:
        ctx.message = message
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(ctx.message)

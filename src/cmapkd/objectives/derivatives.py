"""Gradients that are written out for a first derivative: a second one through them is refused, not silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    """For the `backward` of an autograd function; its gradients are right, and what differentiates them raises.

    torch's `once_differentiable` raises only where the gradient from above needs a derivative itself. A loss whose
    gradient from above is a constant would get second derivatives without those through its saved tensors.

    Raises (when the gradients are differentiated):
        RuntimeError: says what to do.
    """

    @wraps(backward)
    def once(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *given)
        gradients: tuple[Tensor | None, ...] = found if isinstance(found, tuple) else (found,)
        if not torch.is_grad_enabled():  # it is where a graph of the gradients is asked for
            return gradients
        return tuple(
            None if each is None else _Refusing.apply(each.detach().requires_grad_(), type(ctx).__name__)
            for each in gradients
        )

    return once


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name.removesuffix('Backward').strip('_')} has its gradient written out and no second derivative. "
            "In-batch losses have one up to 2,048 pairs in one process, or with chunk at least the batch; a bank's "
            "divergence has none"
        )

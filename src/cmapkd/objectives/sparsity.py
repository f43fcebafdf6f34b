"""The constraint that learned masks keep: a target for the share of weights that are gone, and its price."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def target_sparsity(start: float, end: float, *, progress: float, warmup: float) -> float:
    """A straight line from `start` to `end`, reached when `warmup` of the way is done.

    Args:
        progress: how far the way is, in [0, 1].
        warmup: share of it, >= 0; 0: at once.
    Returns:
        A share of the weights.
    Raises:
        ValueError: a share is not within [0, 1].
    Source: CoFi (arXiv:2204.00408, section 3.2), as TinyCLIP's code has it.
    """
    shares = {"start": start, "end": end, "progress": progress, "warmup": warmup}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a share from 0 to 1, got {share:g}")
    return start + (end - start) * (min(1.0, progress / warmup) if warmup else 1.0)


def sparsity_constraint(
    sparsity: Float[Tensor, ""], target: float, *, linear: Float[Tensor, ""], quadratic: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """linear g + quadratic g², where g is what is missing to the target: max(target - sparsity, 0).

    Minimised by what makes the sparsity, and maximised by the multipliers: their gradient has the other sign, so that
    one optimiser, which only ever minimises, raises them as long as something is missing.

    Args:
        sparsity: expected share of the weights that are gone.
        target: the share that shall be; more than it costs nothing.
        linear, quadratic: Lagrange multipliers, >= 0.
    Returns:
        The price, >= 0; 0 where the target is met.
    Raises:
        ValueError: the target is not within [0, 1].
    Source: TinyCLIP (arXiv:2309.12314, section 3.2; the hinge is that of its code).
    """
    if not 0 <= target <= 1:
        raise ValueError(f"a target is a share from 0 to 1, got {target:g}")
    missing = (target - sparsity).clamp_min(0)
    first, second = (2 * multiplier.detach() - multiplier for multiplier in (linear, quadratic))
    price: Tensor = first * missing + second * missing.square()
    return price

"""Hard-concrete gates: random factors between 0 and 1 that are often exactly 0 or 1, and can be learned.

Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018, arXiv:1712.01312;
with the constants of CoFi (Xia et al. 2022, arXiv:2204.00408), which TinyCLIP took over. `log_alpha` is large for a
unit that stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_TEMPERATURE = 2 / 3
_LOWEST, _HIGHEST = -0.1, 1.1  # the stretched interval, of which what lies outside [0, 1] becomes 0 or 1
_EDGE = 1e-6  # probabilities and draws keep this far from 0 and 1
_SHARPNESS = 0.8  # of the fixed gates, arXiv:2204.00408's code
LOG_ALPHA_RANGE = (math.log(1e-2), math.log(1e2))
"""Where log alpha is kept: there units are hardly ever on, or off, and can still come back."""


def drawn_gates(log_alpha: Float[Tensor, " units"], uniform: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Gates in [0, 1] for draws from [0, 1), with a gradient to `log_alpha` where they are neither 0 nor 1."""
    u = uniform.to(log_alpha.dtype) * (1 - 2 * _EDGE) + _EDGE
    soft = ((u.log() - (1 - u).log() + log_alpha) / _TEMPERATURE).sigmoid()
    return (soft * (_HIGHEST - _LOWEST) + _LOWEST).clamp(0, 1)


def keep_probability(log_alpha: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """How likely each gate is not 0, within [1e-6, 1 - 1e-6]."""
    return (log_alpha - _TEMPERATURE * math.log(-_LOWEST / _HIGHEST)).sigmoid().clamp(_EDGE, 1 - _EDGE)


def expected_weights(
    channels: Float[Tensor, " channels"], heads: Sequence[Tensor], units: Sequence[Tensor], *, per_head: float
) -> Float[Tensor, ""]:
    """How many entries of a tower's matrices are kept on average: those whose channel, and head or unit, both are.

    Args:
        channels, heads, units: log alphas; the latter two of each layer.
        per_head: entries of one head and channel. A hidden unit and channel have 2.
    """
    kept_heads, kept_units = (
        torch.stack([keep_probability(layer).sum() for layer in layers]).sum() for layers in (heads, units)
    )
    return keep_probability(channels).sum() * (per_head * kept_heads + 2 * kept_units)


@torch.no_grad()
def fixed_gates(log_alpha: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Gates without chance: as many as are expected to be 0 are, those of the smallest `log_alpha`; one at least is
    not. The others are fractions, about 0.996 for a unit that surely stays.
    """
    gates = (log_alpha / _TEMPERATURE * _SHARPNESS).sigmoid()
    num_off = (len(gates) - keep_probability(log_alpha).sum().double()).round().clamp(max=len(gates) - 1)
    rank = gates.argsort(stable=True).argsort()  # on the device: the host need not know how many are off
    return gates.masked_fill(rank < num_off, 0.0)

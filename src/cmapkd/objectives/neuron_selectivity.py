"""Neuron selectivity: at which tokens of a text the neurons of two models answer, whatever their widths."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def selectivity_distance(
    student: Float[Tensor, "rows width"],
    teacher: Float[Tensor, "rows other_width"],
    sample: Int[Tensor, " rows"],
    number: int,
) -> Float[Tensor, " samples"]:
    """Squared distance of two maps of tokens x tokens for each sample; 0 where it has at most one token.

    Each neuron's answers to the L tokens of a sample are a vector of length one, s_i or t_i. With them
    `G_S = Σ_i s_i s_iᵀ / D_S`, `G_T = Σ_i t_i t_iᵀ / D_T`, both [L, L], and the distance is `‖G_S - G_T‖²`. This is the
    squared maximum mean discrepancy of the neurons with the kernel `(s · t)²`, its constant among them.

    Args:
        student, teacher: states of the same tokens, of any widths D_S and D_T.
        sample: of each row, ascending.
        number: of samples.
    Returns:
        >= 0, float32 or wider.
    Source: Huang and Wang 2017, arXiv:1707.01219, equations 4 to 6 with the polynomial kernel of degree 2.
    """
    student, teacher = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (student, teacher))
    lengths = torch.bincount(sample, minlength=number)
    place = torch.arange(len(sample), device=sample.device) - (lengths.cumsum(0) - lengths)[sample]
    longest = int(lengths.max()) if len(sample) else 0
    maps = []
    for states in (student, teacher):
        table = states.new_zeros(number, longest, states.shape[-1]).index_put((sample, place), states)
        neurons = F.normalize(table, dim=1)  # empty places are zeros, which change neither norms nor products
        maps.append(neurons @ neurons.mT / states.shape[-1])
    return (maps[0] - maps[1]).square().sum((1, 2))

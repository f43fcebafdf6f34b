"""Distance between a student's tokens or grid cells of one level and its teacher's, sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32, check_same_width

# Far below the variance of any feature in use, so that a scaling cancels, and above the rounding noise of a token
# whose channels are all equal, which so becomes zero.
_VARIANCE_FLOOR = 1e-12


def level_distance(
    student: Float[Tensor, "batch tokens width"],
    teacher: Float[Tensor, "batch tokens width"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean over a sample's real tokens and channels of the squared difference of channel-standardised features.

    Each token is brought to mean zero and variance one over its channels (layer norm without affine), in both models;
    its distance is then 2 - 2 x the correlation of the two over channels. So a level weighs the same whatever its
    width, its number of tokens or the size of its features.

    Args:
        student: words, patches or grid cells, already projected to the teacher's width.
        teacher: at the same positions as the student's; detached here.
        mask: True where a token is real; None where all are. What stands in the others has no influence.
    Returns:
        For each sample in [0, 4], no unit: zero at agreement, 2 in expectation for unrelated features; 0 for a sample
        without a real token. float32 or wider.
    Raises:
        ValueError: the shapes differ, or the mask is not a bool for each token.
    Source: the intra-modal term of the CMAPKD design, section 5.
    """
    return _mean_over_tokens(_token_distances, student, teacher, mask)


def hint_distance(
    student: Float[Tensor, "batch tokens width"],
    teacher: Float[Tensor, "batch tokens width"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean over a sample's real tokens and channels of the squared difference of the features as they are.

    Args:
        student: words, patches or grid cells, already mapped to the teacher's width.
        teacher: at the same positions as the student's; detached here.
        mask: True where a token is real. None: all are. What stands in the others has no influence.
    Returns:
        For each sample >= 0, in squared units of the teacher's features: zero at agreement; 0 for a sample without a
        real token. float32 or wider.
    Raises:
        ValueError: the shapes differ, or the mask is not a bool for each token.
    Source: Romero et al. 2015, arXiv:1412.6550, equation 3, which is half the sum over places and channels.
    """
    return _mean_over_tokens(_raw_distances, student, teacher, mask)


def _mean_over_tokens(
    distances: Callable[[Tensor, Tensor], Tensor],  # of tokens, [batch tokens width] twice to [batch tokens]
    student: Float[Tensor, "batch tokens width"],
    teacher: Float[Tensor, "batch tokens width"],
    mask: Bool[Tensor, "batch tokens"] | None,
) -> Float[Tensor, " batch"]:
    check_same_width(student, teacher, "level")
    if student.ndim != 3:
        raise ValueError(
            f"expected levels as [batch, tokens, width], got shape {tuple(student.shape)}: flatten a grid's rows and "
            "columns to tokens, and give vectors of whole samples to embedding_distance"
        )
    if mask is None:
        return distances(student, teacher).sum(-1) / max(1, student.shape[1])
    if mask.shape != student.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and type {mask.dtype}, but the level has shape "
            f"{tuple(student.shape)}: give one bool for each sample and token, True where the token is real"
        )
    padding = ~mask[..., None]  # filled before anything is computed: zero times what stands there could be NaN
    of_tokens = distances(student.masked_fill(padding, 0), teacher.masked_fill(padding, 0))
    return of_tokens.sum(-1) / mask.sum(-1).clamp(min=1)


def _raw_distances(
    student: Float[Tensor, "batch tokens width"], teacher: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch tokens"]:
    return (at_least_float32(student) - at_least_float32(teacher.detach())).square().mean(-1)


def _token_distances(
    student: Float[Tensor, "batch tokens width"], teacher: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch tokens"]:
    return (_standardised(student) - _standardised(teacher.detach())).square().mean(-1)


def _standardised(features: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
    return F.layer_norm(at_least_float32(features), features.shape[-1:], eps=_VARIANCE_FLOOR)

"""Visual tokens of one encoder against those of several others: errors by token, and how much each encoder counts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32


def encoder_errors(
    student: Float[Tensor, "pictures tokens width"],
    expert: Float[Tensor, "pictures tokens width"],
    token_weights: Float[Tensor, "pictures tokens"] | None,
) -> Float[Tensor, " pictures"]:
    """Mean over tokens of the squared error, plus its sum under token weights.

    Args:
        student, expert: tokens of the same places; the error of a token is a mean over channels.
        token_weights: of each picture, they sum to 1; None: the second part is left out.
    Returns:
        Of each picture, >= 0, in squared units of the tokens; float32 or wider.
    Raises:
        ValueError: the shapes differ.
    Source: MoVE-KD, Cao et al. 2025, arXiv:2501.01709, its released code.
    """
    if student.shape != expert.shape:
        raise ValueError(
            f"visual tokens of the student have shape {tuple(student.shape)} and those of an encoder "
            f"{tuple(expert.shape)}: an adapter must bring them together"
        )
    errors = (at_least_float32(student) - at_least_float32(expert)).square().mean(-1)
    if token_weights is None:
        return errors.mean(-1)
    return errors.mean(-1) + (errors * token_weights.to(errors.dtype)).sum(-1)


def encoder_shares(
    scores: Float[Tensor, "pictures others"],
    anchor: float,
    mean_share: Float[Tensor, " others"],
    *,
    limit: float = 0.8,
    bias: float = 0.2,
) -> Float[Tensor, "pictures others_and_anchor"]:
    """How much each encoder counts for each picture: the first one a fixed share, the others by their scores.

    Args:
        scores: of the other encoders, how like the first one they are; their softmax shares out what is left.
        anchor: the share of the first one, in [0, 1].
        mean_share: batch mean of that softmax, without gradient. Where one of the others has more than `limit`, a
            second softmax over the shares flattens them, as in the released code. Its `bias` changes nothing.
    Returns:
        Rows that sum to 1, the first encoder's share first.
    Source: MoVE-KD, Cao et al. 2025, arXiv:2501.01709, its released code.
    """
    shares = at_least_float32(scores).softmax(-1)
    flattened = (shares + bias).softmax(-1)
    shares = torch.where(mean_share.max() > limit, flattened, shares)
    return torch.cat([torch.full_like(shares[:, :1], anchor), (1 - anchor) * shares], dim=-1)

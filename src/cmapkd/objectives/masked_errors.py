"""Errors of features under several masks of weights, and how much the masks overlap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_LEAST = 1e-20  # of a mask's sum: below it the mask has vanished, and so has its part of the loss


def masked_error(
    errors: Float[Tensor, "batch items"], masks: Float[Tensor, "batch masks items"], *, divided: bool = True
) -> Float[Tensor, " batch"]:
    """Mean over the masks of the mean error that each mask weighs: Σ_i m_i e_i / Σ_i m_i.

    Each is divided by the mask's own sum, so no mask can lower the loss by becoming small everywhere. A mask can still
    lower it by leaving the items with large errors.

    Args:
        errors: of places or channels, >= 0.
        masks: weights of the items, >= 0. A mask of zeros counts as an error of zero.
        divided: by the sum of the mask; if not, by the number of items.
    Returns:
        For each sample, between its smallest and its largest error where divided, in units of the errors.
    Raises:
        ValueError: samples or items do not pair up.
    Source: masked distances of Lan & Tian 2025 (ACAM-KD, arXiv:2503.06307), whose normalisation is unknown; division
        by the sum as in MasKD (Huang et al. 2023, arXiv:2205.14589).
    """
    if masks.ndim != 3 or (masks.shape[0], masks.shape[2]) != tuple(errors.shape):
        raise ValueError(
            f"errors have shape {tuple(errors.shape)} but masks {tuple(masks.shape)}: give [batch, items] and "
            "[batch, masks, items] of the same samples and items"
        )
    if not divided:
        return (masks * errors[:, None]).mean((-2, -1))
    return ((masks * errors[:, None]).sum(-1) / masks.sum(-1).clamp_min(_LEAST)).mean(-1)


def mask_overlap(masks: Float[Tensor, "batch masks items"], *, of_one_length: bool = True) -> Float[Tensor, " batch"]:
    """Mean Dice coefficient of the pairs of masks: 2 m_i · m_j / (|m_i|² + |m_j|²), i other than j.

    As printed, a mask that becomes small overlaps with no larger one, so that the overlap makes masks vanish one after
    the other. Masks of length 1 overlap by their cosine, whatever size they had.

    Args:
        masks: weights, >= 0; at least two.
        of_one_length: brings every mask to length 1 first.
    Returns:
        For each sample in [0, 1]: 1 where all masks are alike, 0 where no two have an item in common.
    Raises:
        ValueError: there is one mask.
    Source: the diversity loss of Lan & Tian 2025 (ACAM-KD, arXiv:2503.06307), pair by pair.
    """
    number = masks.shape[1]
    if number < 2:
        raise ValueError("masks overlap in pairs, and there is one: ask for two masks at least, or for no diversity")
    if of_one_length:
        masks = F.normalize(masks, dim=-1, eps=_LEAST)
    with torch.autocast(masks.device.type, enabled=False):
        products = masks @ masks.mT
    sizes = products.diagonal(dim1=-2, dim2=-1)
    dice = 2 * products / (sizes[:, :, None] + sizes[:, None]).clamp_min(_LEAST)
    others = ~torch.eye(number, dtype=torch.bool, device=masks.device)
    return (dice * others).sum((-2, -1)) / (number * (number - 1))

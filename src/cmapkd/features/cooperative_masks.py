"""Masks over channels and places that two models' tokens make together."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class CooperativeMasks(nn.Module):
    """Masks of channels and places from both models' tokens of one width: the teacher asks, the student answers."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        inner = max(1, width // 2)
        self.query, self.key = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.channel_units = nn.Parameter(torch.randn(count, 1))
        self.spatial_units = nn.Parameter(torch.randn(count, width) / math.sqrt(width))

    def forward(
        self, student: Float[Tensor, "batch cells width"], teacher: Float[Tensor, "batch cells width"]
    ) -> tuple[Float[Tensor, "batch masks width"], Float[Tensor, "batch masks cells"]]:
        """Masks of channels and of places, before the sigmoid."""
        query, key = self.query(teacher), self.key(student)
        attention = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        fused = attention @ self.value(student)
        channels = self.channel_units * fused.mean(1, keepdim=True)  # [masks 1] times [batch 1 width]
        return channels, self.spatial_units @ fused.mT


def of_largest_one(logits: Float[Tensor, "batch masks items"]) -> Float[Tensor, "batch masks items"]:
    """Sigmoids by the largest of each mask: sigmoids of -100 are zeros in float32, and their ratios are not."""
    log_masks = F.logsigmoid(logits)
    return (log_masks - log_masks.detach().amax(-1, keepdim=True)).exp()


def share_of(masks: Float[Tensor, "batch masks items"]) -> Float[Tensor, "batch masks"]:
    """The share of items that a mask weighs, (Σm)² / (n Σm²): 1 where all count alike, 1/n where one counts."""
    return masks.mean(-1).square() / masks.square().mean(-1).clamp_min(1e-20)

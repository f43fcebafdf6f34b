"""Regions of a picture and words of its caption that read each other, as one vector (DCLIP's meta-teacher)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cmapkd.features.cross_attention import CrossAttention

POOLING_TEMPERATURE = 2.0


class RegionFusion(nn.Module):
    """C' = LN(C + A(C, P)) of words C, P' = LN(P + A(P, C)) of regions P, and the mean of both, each pooled.

    Args:
        width: of regions and of the result; `word_width`: of words, which are mapped to it.
        heads: of each attention.
    """

    def __init__(self, width: int, word_width: int, heads: int) -> None:
        super().__init__()
        self.map_words = nn.Linear(word_width, width)
        self.words_read, self.regions_read = (CrossAttention(width, heads, norm=False) for _ in range(2))
        self.norm_words, self.norm_regions = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self,
        regions: Float[Tensor, "batch regions width"],
        words: Float[Tensor, "batch words word_width"],
        real_regions: Bool[Tensor, "batch regions"],
        real_words: Bool[Tensor, "batch words"] | None,
    ) -> Float[Tensor, "batch width"]:
        """One vector of each pair.

        Args:
            real_regions, real_words: what is no padding, one at least in each row; None: everything.
        """
        words = self.map_words(words)
        regions = regions.to(words.dtype)
        of_words = self.norm_words(words + self.words_read(words, regions, real_regions))
        of_regions = self.norm_regions(regions + self.regions_read(regions, words, real_words))
        return (pooled_near_mean(of_words, real_words) + pooled_near_mean(of_regions, real_regions)) / 2


def pooled_near_mean(
    x: Float[Tensor, "batch tokens width"], real: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, "batch width"]:
    """g(X) = sum of softmax(cos(x_i, mean of X) / 2) x_i over what is real; near the mean of X.

    Source: DCLIP, Csizmadia et al. 2025, arXiv:2505.21549, as its repository computes it.
    """
    weights = x.new_ones(x.shape[:2]) if real is None else real.to(x.dtype)
    mean = (x * weights[..., None]).sum(1, keepdim=True) / weights.sum(1)[:, None, None].clamp_min(1)
    near = F.cosine_similarity(x, mean, dim=-1) / POOLING_TEMPERATURE
    if real is not None:
        near = near.masked_fill(~real, -1e30)
    pooled: Tensor = (near.softmax(1)[..., None] * x).sum(1)
    return pooled

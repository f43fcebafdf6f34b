"""Learned queries that read a model's states, layer by layer: from any number of tokens to a fixed number of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Resampler(nn.Module):
    """A perceiver resampler: queries attend over tokens and over themselves, and a norm ends it.

    Tokens have no positions of their own here: the states of a language model bring theirs.

    Args:
        width: of the tokens; `to`: of the results, and of all that is inside.
        queries: how many results there are.
        depth: layers, each an attention and a feed-forward network.
        heads: of each attention; `head_width`: channels of each.
        factor: width inside the feed-forward network, in multiples of `to`.
    Source: Alayrac et al. 2022 (Flamingo), arXiv:2204.14198, section 3.1.
    """

    def __init__(
        self, width: int, to: int, *, queries: int, depth: int, heads: int, head_width: int, factor: int
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, to) / to**0.5)
        self.enter = nn.Linear(width, to)
        self.layers = nn.ModuleList(_Layer(to, heads, head_width, factor) for _ in range(depth))
        self.leave, self.norm = nn.Linear(to, to), nn.LayerNorm(to)

    def no_weight_decay(self) -> set[str]:
        return {"queries"}

    def forward(
        self, tokens: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch queries to"]:
        """What the queries read.

        Args:
            mask: True where a token is read. Where none of a row is, the queries read each other.
        """
        entered = self.enter(tokens)
        latents = self.queries.to(entered.dtype).expand(len(tokens), -1, -1)
        for layer in self.layers:
            latents = layer(entered, latents, mask)
        result: Tensor = self.norm(self.leave(latents))
        return result


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int, factor: int) -> None:
        super().__init__()
        inner, self.heads = heads * head_width, heads
        self.norm_tokens, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ask = nn.Linear(width, inner, bias=False)
        self.told = nn.Linear(width, 2 * inner, bias=False)
        self.join = nn.Linear(inner, width, bias=False)
        hidden = factor * width
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, tokens: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
        asking = self.norm_latents(latents)
        read = torch.cat([self.norm_tokens(tokens), asking], dim=1)
        keys, values = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.told(read).chunk(2, -1))
        queries = self.ask(asking).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        readable = F.pad(mask, (0, latents.shape[1]), value=True)[:, None, None]
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=readable)
        latents = latents + self.join(found.transpose(1, 2).flatten(2))
        result: Tensor = latents + self.feed(latents)
        return result

"""Attention of one tower's vectors over the other tower's tokens."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from cmapkd.config import ConfigError


class CrossAttention(nn.Module):
    """Each query reads what it needs of some tokens, by several heads of one width.

    Args:
        width: of queries, tokens and results.
        norm: whether queries and tokens have layer norms of their own, in front of the attention.
    Raises:
        ConfigError: the width cannot be shared out among the heads.
    """

    def __init__(self, width: int, heads: int, *, norm: bool) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"method.heads is {heads}, and {heads} heads cannot share {width} channels of the joint space: set "
                "method.heads to a divisor"
            )
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q = nn.LayerNorm(width) if norm else nn.Identity()
        self.ln_k = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(
        self,
        queries: Float[Tensor, "batch queries width"],
        tokens: Float[Tensor, "batch tokens width"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """What the queries read.

        Args:
            mask: True where a token is real, one at least in each row; None where all are.
        """
        keys = self.ln_k(tokens)
        hidden = None if mask is None else ~mask
        read: Tensor = self.attn(self.ln_q(queries), keys, keys, key_padding_mask=hidden, need_weights=False)[0]
        return read

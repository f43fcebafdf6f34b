"""Attention routing: a learned query looks at each level of the sample itself, and its attention is the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.weighting.base import WeightingConfig
from cmapkd.weighting.gate import BoundedConfig, BoundedGate


class AttentionConfig(BoundedConfig):
    """The width in which levels are compared with the query, and how far the weights may go."""

    name: Literal["attention"] = Field("attention", description="The weighting's name in WEIGHTINGS.")
    key_width: int = Field(32, ge=1, description="Width of the query and of each level's key.")


class AttentionWeighting(BoundedGate):
    """The bounded gate whose logits are q · k_i / sqrt(width), k_i = W_i LN(v_i) + b_i of the level's own vector v_i.

    There is one query for each modality, because each modality's levels have a weighting of their own. Levels have
    different widths, so each has its own key map; its bias lets a level count more in every sample alike. The query
    starts at zero: weights are uniform at first.

    Args:
        widths: of the items' vectors, in the order of the items; the context is these vectors, one after the other.
    Raises:
        ValueError: there is not one width for each item.
    Source: the routing variant of the method's selection network; training and bounds are the gate's.
    """

    Config: ClassVar[type[WeightingConfig]] = AttentionConfig
    reads_levels: ClassVar[bool] = True

    def __init__(self, config: AttentionConfig, *, items: Sequence[str], widths: Sequence[int]) -> None:
        if len(widths) != len(items):
            raise ValueError(
                f"{len(widths)} widths for {len(items)} items ({', '.join(items)}): give the width of each one's vector"
            )
        super().__init__(config, items=items, context_dim=sum(widths))
        self.widths = tuple(widths)
        self.keys = nn.ModuleList(nn.Linear(width, config.key_width) for width in widths)
        self.query = nn.Parameter(torch.zeros(config.key_width))

    def logits(self, context: Float[Tensor, "batch context_dim"]) -> Float[Tensor, "batch items"]:
        vectors = zip(self.keys, context.split(self.widths, dim=-1), strict=True)
        keys = torch.stack([key(F.layer_norm(vector, vector.shape[-1:])) for key, vector in vectors], dim=1)
        logits: Tensor = keys @ self.query / len(self.query) ** 0.5
        return logits

"""Key tokens: the few tokens of a level that carry most, so that only these are stored and compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmapkd.features.pyramid import cells_of, pooled
from cmapkd.models.types import Features, Level, TowerFeatures

KeyTokensBy = Literal["norm", "text", "class"]


@dataclass(frozen=True, slots=True)
class KeyTokens:
    """Which tokens of a level are key tokens: how many at most, and by which measure."""

    count: int = 16
    by: KeyTokensBy = "class"

    def of(self, features: Features) -> Features:
        """The features with the key tokens of each level only; levels that have been reduced before stay as they are.

        By `class` they are compared with the level's class token, or where it has none with the mean of its tokens; by
        `text` with the text's embedding.

        Raises:
            ValueError: by `text`, and the embedding is not as wide as a level.
        """
        text = features.text.embedding

        def reduced(tower: TowerFeatures) -> TowerFeatures:
            return replace(tower, levels={name: self._reduced(level, text) for name, level in tower.levels.items()})

        return replace(features, image=reduced(features.image), text=reduced(features.text))

    def _reduced(self, level: Level, text: Tensor) -> Level:
        if level.places is not None:
            return level
        cells, mean = cells_of(level), pooled(level)
        mask = None if level.mask is None else level.mask[:, level.num_prefix :]
        has_class = level.layout == "tokens" and level.num_prefix > 0
        queries = {"norm": None, "text": text, "class": level.values[:, 0] if has_class else mean}
        places = key_token_indices(cells, self.count, by=self.by, query=queries[self.by], mask=mask)
        values = take_tokens(cells, places)
        grid = (level.values.shape[-2], level.values.shape[-1]) if level.layout == "map" else level.grid
        if mask is None:
            return Level(values, "tokens", 0, grid, None, places, mean)
        real = mask.gather(1, places)
        places, values = places.masked_fill(~real, -1), values.masked_fill(~real[..., None], 0)
        return Level(values, "tokens", 0, grid, real, places, mean)


@torch.no_grad()
def key_token_indices(
    values: Float[Tensor, "batch tokens width"],
    k: int,
    *,
    by: KeyTokensBy,
    query: Float[Tensor, "batch width"] | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "batch key_tokens"]:
    """Where the `k` most informative tokens of each sample stand, in ascending order.

    Args:
        values: tokens of one level without prefix tokens, the teacher's: the student is read at the same places.
        k: > 0; more than there are tokens gives all of them.
        by: `norm`, the length of the token; `text`, its cosine with `query`; `class`, its product with `query`, which
            is how attention ranks tokens when the learned maps to queries and keys are left out.
        query: the text's embedding in the width of the tokens (`text`), or this level's class token (`class`).
        mask: True where a token is real; the others come only after all real ones, when a sample has fewer than `k`.
            `mask.gather(1, indices)` says which of the chosen are real.
    Returns:
        Indices into the tokens; of equally informative ones the first is taken.
    Raises:
        ValueError: `k` is not positive, or `query` is missing, of another width, or given for `norm`.
    Source: CMAPKD's own design, section 8 (key tokens, sparse matching).
    """
    if k < 1:
        raise ValueError(f"k must be positive, got {k}")
    scores = _scores(values.to(torch.promote_types(values.dtype, torch.float32)), by, query)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return best.sort(dim=1).values


def take_tokens(
    values: Float[Tensor, "batch tokens width"], indices: Int[Tensor, "batch key_tokens"]
) -> Float[Tensor, "batch key_tokens width"]:
    """The tokens at `indices`; gradients reach these alone."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))


def _scores(values: Tensor, by: KeyTokensBy, query: Tensor | None) -> Float[Tensor, "batch tokens"]:
    if by == "norm":
        if query is not None:
            raise ValueError("key tokens by norm compare with nothing: leave `query` out, or choose by text or class")
        lengths: Tensor = torch.linalg.vector_norm(values, dim=-1)
        return lengths
    if query is None or query.shape != (len(values), values.shape[-1]):
        given = "none" if query is None else f"shape {tuple(query.shape)}"
        raise ValueError(
            f"key tokens by {by} compare tokens of shape {tuple(values.shape)} with a query of shape "
            f"{(len(values), values.shape[-1])}, but it has {given}: give the text's embedding in the tokens' width, "
            "or the class token; or choose by norm."
        )
    if by == "text":
        values, query = F.normalize(values, dim=-1), F.normalize(query.to(values.dtype), dim=-1)
    return (values * query.to(values.dtype)[:, None]).sum(-1)

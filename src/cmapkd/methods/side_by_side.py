"""Several views and texts of each sample: their embeddings side by side, and which text stands first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from cmapkd.data.types import Batch
from cmapkd.models import TowerFeatures

Views = Float[Tensor, "batch views dim"]


def side_by_side(first: TowerFeatures, more: Mapping[str, TowerFeatures], names: Iterable[str]) -> Views:
    """Embeddings of each sample's views or texts: the main one, then those that are named, in their order."""
    size = len(first.embedding)
    return torch.cat([first.embedding[:, None], *(more[name].embedding.unflatten(0, (size, -1)) for name in names)], 1)


def with_text_of(part: Batch, pool: str, role: str) -> Batch:
    """For a role, with the first of a pool's two texts in the place of the caption, and the second alone as the pool.

    Args:
        pool: of which the batch brings two texts of each sample.
    """
    inputs = part.pairs(role)
    texts, other = (inputs.more_texts[pool].text_of_each(place) for place in (0, 1))
    changed = replace(inputs, texts=texts, more_texts={**inputs.more_texts, pool: other})
    return replace(part, inputs={**part.inputs, role: changed})

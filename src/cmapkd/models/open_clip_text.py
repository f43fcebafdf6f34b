"""open_clip's text towers without padding: which of them compute the same, and how they are run on short texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmapkd.data.tokens import TokenBatch
from cmapkd.models.open_clip_levels import has_transformers_text

_MASKED_POOLERS = ("MeanPooler", "MaxPooler", "ClsPooler", "ClsLastHiddenStatePooler")


def why_whole(model: Any, tokens: TokenBatch) -> str | None:
    """Why texts of an open_clip model must be padded to full length; None: those of a batch may end with the longest.

    Args:
        model: open_clip's, or its text tower.
        tokens: of texts shorter than the full length, and padded to it, by the model's tokenizer.
    """
    if has_transformers_text(model):
        if type(model.text.pooler).__name__ not in _MASKED_POOLERS:
            return f"{type(model.text.pooler).__name__} may pool padding"
        masked = model.text.config.pad_token_id
        same = bool((tokens.mask | (tokens.ids == masked)).all())
        return None if same else f"its tower masks the id {masked}, but its tokenizer pads with another"
    tower = getattr(model, "text", model)
    if getattr(tower, "cls_emb", None) is not None:
        return "its class token stands behind the padding"
    if not is_causal(tower):
        return "its attention is not causal, so every token sees the padding"
    places = _pooled_places(tower, tokens.ids)
    if places is None or not bool(tokens.mask.gather(1, places[:, None]).all()):
        return f"it pools by {pool_type(tower)!r}, which in a short text is padding"
    return None


def is_causal(tower: Any) -> bool:
    """Whether a text tower of open_clip's own lets no token see a later one."""
    plain = getattr(tower, "cls_emb", None) is None and not getattr(tower, "use_pad_mask", False)
    return plain and tower.attn_mask is not None


def pool_type(tower: Any) -> str:
    return str(getattr(tower, "pool_type", None) or tower.text_pool_type)


def encode_short(
    tower: Any, ids: Int[Tensor, "batch length"], numbers: Sequence[int] = ()
) -> tuple[Float[Tensor, "batch dim"], dict[int, Float[Tensor, "batch length width"]]]:
    """A causal tower on texts of any length up to the full one; open_clip's own code takes no other than that.

    Args:
        numbers: of blocks, ascending.
    Returns:
        Embeddings, and what the numbered blocks return.
    """
    length = ids.shape[1]
    cast = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(ids).to(cast) + tower.positional_embedding[:length].to(cast)
    mask = tower.attn_mask[:length, :length]
    values: dict[int, Tensor] = {}
    if numbers:
        x, found = tower.transformer.forward_intermediates(x, attn_mask=mask, indices=list(numbers))
        values = dict(zip(numbers, found, strict=True))
    else:
        x = tower.transformer(x, attn_mask=mask)
    places = _pooled_places(tower, ids)
    assert places is not None
    pooled = tower.ln_final(x)[torch.arange(x.shape[0], device=x.device), places]
    projection = tower.text_projection
    if projection is not None:
        pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
    return pooled, values


def _pooled_places(tower: Any, ids: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"] | None:
    """Which place of each text open_clip's `text_global_pool` takes; None: no single one."""
    kind = pool_type(tower)
    if kind == "argmax":
        return ids.argmax(-1)
    if kind == "eos":
        end = getattr(tower, "eos_id", None) or getattr(tower, "text_eos_id", None)
        return None if end is None else (ids == end).int().argmax(-1)
    if kind in ("first", "last"):
        return torch.full_like(ids[:, 0], 0 if kind == "first" else ids.shape[1] - 1)
    return None

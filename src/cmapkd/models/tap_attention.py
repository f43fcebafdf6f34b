"""Attention maps of named layers, while all layers compute with torch's fused attention.

transformers gives maps only where every layer computes them (`eager`), which costs memory in each. Here one attention
function calls the fused one, and writes the map out for the layers that were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

NAME = "cmapkd_sdpa"
READABLE = ("sdpa", "eager", NAME)  # of a model that computes with another one, other numbers would be returned
_ASKED: ContextVar[tuple[frozenset[int], dict[int, Tensor]] | None] = ContextVar("attention layers", default=None)


@contextmanager
def attention_of(language: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Float[batch heads length length] by layer, of one forward pass of `language` inside this context.

    A row holds what its token attends to, and sums to 1; dropout is not applied to it. Gradients flow through the maps.

    Args:
        language: a language model of transformers, without its head.
        layers: numbers from 0; none: nothing is changed.
    Raises:
        ValueError: the model computes attention in a way whose maps cannot be written out.
    """
    kept: dict[int, Tensor] = {}
    if not layers:
        yield kept
        return
    config = language.config
    before = config._attn_implementation
    if before not in READABLE:
        raise ValueError(f"attention maps are read of models that compute with sdpa or eager, not {before!r}")
    _register()
    config._attn_implementation = NAME
    token = _ASKED.set((frozenset(layers), kept))
    try:
        yield kept
    finally:
        _ASKED.reset(token)
        config._attn_implementation = before
    missing = sorted(set(layers) - kept.keys())
    if missing:
        raise ValueError(
            f"layers {missing} of {type(language).__name__} have no attention maps: they do not call transformers' "
            "attention functions"
        )


def _register() -> None:
    """Under the name of our function, masks are made as for the fused one; without this Gemma 3 would see none."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    asked = _ASKED.get()
    if asked is not None and module.layer_idx in asked[0]:
        causal = settings.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        asked[1][module.layer_idx] = _map(query, key, attention_mask, settings.get("scaling"), causal=bool(causal))
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return output


def _map(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, *, causal: bool) -> Tensor:
    """softmax(scaling * QK) in float32 under the mask, in the dtype of the model."""
    groups = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2) * scaling
    least = torch.finfo(scores.dtype).min  # not -inf: a row of padding may attend to nothing
    if mask is None:
        if causal and query.shape[2] > 1:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, least)
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[..., : key.shape[2]], least)
    else:
        scores = scores + mask[..., : key.shape[2]]
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype)

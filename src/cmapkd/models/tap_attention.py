"""Attention maps of named layers, while all layers compute with torch's fused attention; and keys that are hidden.

transformers gives maps only where every layer computes them (`eager`), which costs memory in each. Here one attention
function calls the fused one, and writes the map out for the layers that were asked for. The same function hides keys
from queries in every layer, whatever mask the model makes for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAME = "cmapkd_sdpa"
READABLE = ("sdpa", "eager", NAME)  # of a model that computes with another one, other numbers would be returned
MEAN = -1  # under which the mean over layers stands


@dataclass(frozen=True)
class _Asked:
    layers: frozenset[int]
    mean: bool
    hidden: Tensor | None
    kept: dict[int, Tensor] = field(default_factory=dict)


_ASKED: ContextVar[_Asked | None] = ContextVar("attention layers", default=None)


@contextmanager
def attention_of(
    language: Any, layers: Sequence[int], *, mean: bool = False, hidden: Tensor | None = None
) -> Iterator[dict[int, Tensor]]:
    """Float[batch heads length length] by layer, of one forward pass of `language` inside this context.

    A row holds what its token attends to, and sums to 1; dropout is not applied to it. Gradients flow through the maps.

    Args:
        language: a language model of transformers, without its head.
        layers: numbers from 0; none, no mean and nothing hidden: nothing is changed.
        mean: whether the mean over all layers and heads is kept, too, Float[batch length length] under `MEAN`. No more
            than one layer's map is held for it.
        hidden: Bool[batch length length], keys (last) that a query may not attend to, besides those of the model's own
            mask; never all of a query.
    Raises:
        ValueError: the model computes attention in a way whose maps cannot be written out.
    """
    asked = _Asked(frozenset(layers), mean, hidden)
    kept = asked.kept
    if not (layers or mean or hidden is not None):
        yield kept
        return
    config = language.config
    before = config._attn_implementation
    if before not in READABLE:
        raise ValueError(f"attention maps are read of models that compute with sdpa or eager, not {before!r}")
    _register()
    config._attn_implementation = NAME
    token = _ASKED.set(asked)
    try:
        yield kept
    finally:
        _ASKED.reset(token)
        config._attn_implementation = before
    if mean and MEAN in kept:
        kept[MEAN] = kept[MEAN] / config.num_hidden_layers
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
    causal = settings.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    if asked is not None and asked.hidden is not None:
        attention_mask = _without(asked.hidden, attention_mask, causal=causal)
    if asked is not None and (asked.mean or module.layer_idx in asked.layers):
        maps = _map(query, key, attention_mask, settings.get("scaling"), causal=causal)
        if module.layer_idx in asked.layers:
            asked.kept[module.layer_idx] = maps
        if asked.mean:
            before = asked.kept.get(MEAN)
            asked.kept[MEAN] = maps.mean(1) if before is None else before + maps.mean(1)
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return output


def _without(hidden: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """The model's own mask with further keys hidden."""
    seen = ~hidden[:, None]
    if mask is None:
        return seen.tril() if causal else seen
    if mask.dtype == torch.bool:
        return mask[..., : seen.shape[-1]] & seen
    return mask[..., : seen.shape[-1]].masked_fill(~seen, torch.finfo(mask.dtype).min)


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

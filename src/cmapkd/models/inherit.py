"""Weights of a smaller model as slices of a larger one's: layers by a rule, widths by their leading part, heads whole.

TinyCLIP's manual weight inheritance (Wu et al., ICCV 2023, arXiv:2309.12314, section 3.2), for any two models of one
family whose weights bear the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cmapkd.models.base import DualEncoder

DepthRule = Literal["uniform", "official"]
_SHOWN = 4
_IMAGE_PLACES = re.compile(r"(vision|visual).*(position|pos_embed)")  # as the libraries name them
_PROJECTIONS = {"in_proj_weight": 3, "in_proj_bias": 3, "qkv.weight": 3, "qkv.bias": 3, "q_proj.weight": 1,
                "k_proj.weight": 1, "v_proj.weight": 1}  # fmt: skip
_TEXTS = ("a photo of two dogs on the beach.", "the QUICK brown fox; 13 lazy dogs!", "ünïcödé")


def chosen_layers(num_layers: int, of: int, rule: DepthRule) -> list[int]:
    """Which of `of` layers become the `num_layers` of the smaller model.

    `uniform` spreads them from the first to the last. `official` takes every floor(of / num_layers)-th, as the
    published code does: where more than half are kept, these are simply the first ones.

    Raises:
        ValueError: there are fewer than wanted.
    """
    if num_layers > of:
        raise ValueError(f"{num_layers} layers cannot be inherited from {of}")
    if rule == "official":
        return [place * (of // num_layers) for place in range(num_layers)]
    last = max(1, num_layers - 1)
    return [(2 * place * (of - 1) + last) // (2 * last) for place in range(num_layers)]  # rounded, halves up


@torch.no_grad()
def inherit_weights(student: DualEncoder, source: DualEncoder, *, depth: DepthRule = "official") -> None:
    """Overwrites every weight of `student` with its part of the same weight of `source`.

    Raises:
        ValueError: a weight has no counterpart, is larger, or cannot be cut (another patch size, number of image
            positions or head width), or the texts are not tokenised alike; names the first few.
    """
    _check_texts(student, source)
    try:
        student.load_state_dict(inherited(student, source, depth=depth))
    except ValueError as error:
        raise ValueError(f"{student.name} cannot inherit from {source.name}: {error}") from None


def inherited(student: nn.Module, source: nn.Module, *, depth: DepthRule = "official") -> dict[str, Tensor]:
    """A state dict for `student` of parts of the weights of `source`.

    Raises:
        ValueError: see `inherit_weights`.
    """
    larger = source.state_dict()
    layers = _layer_maps(student, source, depth)
    heads = _heads(student, source, layers)
    taken: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, weight in student.state_dict().items():
        origin = _origin(name, layers)
        try:
            if origin not in larger:
                raise ValueError(f"the larger model has no {origin}")
            taken[name] = _part(name, weight, larger[origin], heads.get(name))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"{'; '.join(problems[:_SHOWN])}{more}. It takes a model of the same family and patch size, with no "
            "dimension larger and heads as wide"
        )
    return taken


def _check_texts(student: DualEncoder, source: DualEncoder) -> None:
    tokens, source_tokens = (model.tokenizer(_TEXTS) for model in (student, source))
    same = student.tokenizer.vocab_size == source.tokenizer.vocab_size
    length = min(tokens.ids.shape[1], source_tokens.ids.shape[1])
    if not (same and torch.equal(tokens.ids[:, :length], source_tokens.ids[:, :length])):
        raise ValueError(
            f"{student.name} cannot inherit from {source.name}: they tokenise texts differently, so a token's weights "
            "would be another's"
        )


def _layer_maps(student: nn.Module, source: nn.Module, depth: DepthRule) -> dict[str, list[int]]:
    """Of each stack of layers in the student, by its name: which layers of the source's stack they are."""
    stacks = dict(_stacks(source))
    maps: dict[str, list[int]] = {}
    for name, length in _stacks(student):
        of = stacks.get(_origin(name, maps))
        if of is not None and length <= of:
            maps[name] = chosen_layers(length, of, depth)
    return maps


def _stacks(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Lists of modules of one class, outer before inner; the convolutions of a stem are no such layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            kinds = {type(child) for child in module}
            if len(kinds) == 1 and nn.Sequential not in kinds:
                yield name, len(module)


def _origin(name: str, layers: Mapping[str, list[int]]) -> str:
    """The source's name for a weight or module of the student."""
    parts = name.split(".")
    words = []
    for place, part in enumerate(parts):
        chosen = layers.get(".".join(parts[:place]))
        words.append(str(chosen[int(part)]) if chosen is not None and part.isdigit() else part)
    return ".".join(words)


def _heads(
    student: nn.Module, source: nn.Module, layers: Mapping[str, list[int]]
) -> dict[str, tuple[int, int, int, int]]:
    """Of each projection to queries, keys and values: how many of these it makes at once, the source's and own heads.

    The last number is the width of a head of the source.
    """
    projections: dict[str, tuple[int, int, int, int]] = {}
    modules = dict(source.named_modules())
    for name, module in student.named_modules():
        other = modules.get(_origin(name, layers))
        heads, of = _num_heads(module), _num_heads(other)
        if not heads or not of:
            continue
        for key, at_once in _PROJECTIONS.items():
            weight = _find(other, key)
            if _find(module, key) is not None and weight is not None:
                projections[f"{name}.{key}".lstrip(".")] = (at_once, of, heads, len(weight) // (at_once * of))
    return projections


def _num_heads(module: Any) -> int | None:
    heads = getattr(module, "num_heads", None) or getattr(module, "heads", None)
    return heads if isinstance(heads, int) else None


def _find(module: Any, key: str) -> Tensor | None:
    for part in key.split("."):
        module = getattr(module, part, None)
    return module if isinstance(module, Tensor) else None


def _part(name: str, smaller: Tensor, whole: Tensor, heads: tuple[int, int, int, int] | None) -> Tensor:
    """The part of a weight that has the shape of `smaller`."""
    sizes = f"{tuple(smaller.shape)} of {tuple(whole.shape)}"
    if smaller.ndim == whole.ndim > 1 and _IMAGE_PLACES.search(name) and smaller.shape[-2] != whole.shape[-2]:
        raise ValueError(f"{sizes}: another number of places in the picture")  # the first places of a text are alike
    if smaller.ndim != whole.ndim or any(size > limit for size, limit in zip(smaller.shape, whole.shape, strict=True)):
        raise ValueError(f"{sizes} is no part of it")
    if smaller.shape[2:] != whole.shape[2:] and smaller.ndim == 4:
        raise ValueError(f"{sizes}: a kernel of another size")
    if heads is not None:
        at_once, of, kept, width = heads
        if len(smaller) != at_once * kept * width:
            raise ValueError(f"{sizes}: heads of width {len(smaller) // (at_once * kept)} instead of {width}")
        rest = tuple(slice(size) for size in smaller.shape[1:])
        split = whole.reshape(at_once, of, width, *whole.shape[1:])
        return split[(slice(None), slice(kept), slice(None), *rest)].reshape(smaller.shape)
    return whole[tuple(slice(size) for size in smaller.shape)]

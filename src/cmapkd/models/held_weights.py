"""Weights that autocast casts at every use, held in bf16 once: the same answers bit for bit, in half the memory.

Which these are is not read off the layers but watched. Of a weight that is only ever cast nothing else can be seen; it
is held in bf16 if the model then answers as before, to the last bit. Code may look at the type of a weight, as
open_clip's does to choose that of its embeddings; such matrices are tried apart, and such vectors left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmapkd.models.base import DualEncoder

_TEXTS = ("a photo of a small red square", "two dogs")  # of different lengths, so that one is padded
_READ_TYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]


@torch.no_grad()
def hold_in_bf16(model: DualEncoder) -> None:
    """Holds in bf16 what autocast would cast; the model then answers under autocast alone, where it is now.

    Sets `held`. The answers that are compared are those to noise and two texts, with all levels and with none.

    Args:
        model: frozen and in eval mode, with weights that nobody else reads.
    """
    with torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False):
        expected = _answers(model)
        weights = {name: each for name, each in model.named_parameters() if each.dtype is torch.float32}
        with _Casts() as casts, _TypesRead() as read:
            _answers(model)
        only_cast = [name for name, each in weights.items() if id(each) in casts.only]
        plain = [name for name in only_cast if id(weights[name]) not in read.weights]
        held = _tried(model, weights, plain, expected) or _each_kind(model, weights, plain, expected)
        looked_at = [name for name in only_cast if name not in plain and weights[name].ndim > 1]
        held += _each_kind(model, weights, looked_at, expected)
    model.held = frozenset(held)


def _each_kind(
    model: DualEncoder, weights: dict[str, nn.Parameter], names: Iterable[str], expected: list[Tensor]
) -> list[str]:
    """Those of the names that can be held: the same weight of all blocks together."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    return [name for kind in kinds.values() for name in _tried(model, weights, kind, expected)]


def _tried(model: DualEncoder, weights: dict[str, nn.Parameter], names: list[str], expected: list[Tensor]) -> list[str]:
    """The names if the model answers the same with these weights in bf16, which they then are; else none."""
    before = [weights[name].data for name in names]
    for name in names:
        weights[name].data = weights[name].data.to(torch.bfloat16)
    if all(torch.equal(one, other) for one, other in zip(_answers(model), expected, strict=True)):
        return names
    for name, values in zip(names, before, strict=True):
        weights[name].data = values
    return []


def _answers(model: DualEncoder) -> list[Tensor]:
    """Embeddings and levels, in the two ways that towers compute: with levels and without."""
    side, device = model.image_spec.size, model.device
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    texts = model.tokenizer(_TEXTS).to(device)
    found: list[Tensor] = []
    for image, text in ((model.image_levels, model.text_levels), ((), ())):
        towers = (
            model.encode_image(pixels, [level.name for level in image]),
            model.encode_text(texts, [level.name for level in text]),
        )
        for tower in towers:
            found += [tower.embedding, *(level.values for level in tower.levels.values())]
    return found


class _Casts(TorchDispatchMode):
    """Which weights are cast to bf16 and used in no other way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cast: set[int] = set()
        self._used: set[int] = set()

    @property
    def only(self) -> set[int]:
        return self._cast - self._used

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        casts = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16
        into = self._cast if casts else self._used
        into.update(id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, nn.Parameter))
        return func(*args, **kwargs)


class _TypesRead(TorchFunctionMode):
    """Whose type Python code looks at; under it, torch takes none of its fused ways."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _READ_TYPE:
            self.weights.add(id(args[0]))
        return func(*args, **(kwargs or {}))

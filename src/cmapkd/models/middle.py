"""Both halves of a tower around one of its blocks, as modules that share its own modules and parameters.

Copies are shallow: a half has other children than the tower and the tower's way of calling them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cmapkd.models.transformers_part import path_of_blocks

_STEMS = ("embeddings", "pre_layrnorm")  # of transformers' towers, in front of the blocks


@dataclass(frozen=True, slots=True)
class _Form:
    """How a tower of images is built: its blocks, and the modules and methods in front of them."""

    blocks: str  # a Sequential; or the beginning of names that a number ends
    stem: tuple[str, ...]
    methods: tuple[str, ...] = ()


_TIMM = (
    _Form("blocks", ("patch_embed", "pos_drop", "patch_drop", "norm_pre"), ("_pos_embed",)),  # ViT
    _Form("blocks", ("conv_stem", "bn1")),  # EfficientNet, MobileNet
    _Form("layer", ("conv1", "bn1", "act1", "maxpool")),  # ResNet
    _Form("stages", ("stem",)),  # ConvNeXt and others
)
_OPEN_CLIP = _Form("transformer", ("conv1", "patch_dropout", "ln_pre"), ("_embeds",))


def twin(module: Any, children: Mapping[str, nn.Module]) -> Any:
    """A shallow copy with some children exchanged."""
    made: Any = copy(module)
    made._modules = {**module._modules, **children}
    return made


def trunk_below(trunk: Any, last: str) -> nn.Module:
    """A timm model whose `forward_features` ends with its block `last`.

    Raises:
        LookupError: it is built in another way.
    """
    form = _form_of(trunk, last)
    first, _ = _parted(trunk, form, last)
    others = {name: nn.Identity() for name in trunk._modules if name not in form.stem}
    half: nn.Module = twin(trunk, {**others, **first})
    return half


def trunk_above(trunk: Any, last: str) -> nn.Module:
    """A timm model that takes what its block `last` returns in the place of pictures.

    Raises:
        LookupError: it is built in another way.
    """
    form = _form_of(trunk, last)
    _, rest = _parted(trunk, form, last)
    half = twin(trunk, {**{name: nn.Identity() for name in form.stem}, **rest})
    for method in form.methods:
        setattr(half, method, _unchanged)
    made: nn.Module = half
    return made


def _form_of(trunk: Any, last: str) -> _Form:
    for form in _TIMM:
        fits = all(name in trunk._modules for name in form.stem) and all(hasattr(trunk, name) for name in form.methods)
        if fits and last.startswith(form.blocks):
            return form
    raise LookupError(last)


def _parted(trunk: Any, form: _Form, last: str) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The children that hold blocks up to `last`, with these alone; and with the others alone."""
    number = last.removeprefix(form.blocks).removeprefix(".")
    if not number.isdecimal():
        raise LookupError(last)
    holder = trunk._modules.get(form.blocks)
    if isinstance(holder, nn.Sequential):
        count = int(number) + 1
        return {form.blocks: nn.Sequential(*holder[:count])}, {form.blocks: nn.Sequential(*holder[count:])}
    names = [name for name in trunk._modules if name.removeprefix(form.blocks).isdecimal()]
    first = {name: trunk._modules[name] for name in names if int(name.removeprefix(form.blocks)) <= int(number)}
    rest = {name: trunk._modules[name] for name in names if name not in first}
    return {**_skipped(rest), **first}, {**_skipped(first), **rest}


def _skipped(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: nn.Identity() for name in blocks}


def visual_below(visual: Any, count: int) -> nn.Module:
    """An image tower of open_clip's own that ends with its block number `count`, behind `_embeds`.

    Raises:
        LookupError: it is no plain ViT.
    """
    blocks = _vit_blocks(visual)
    held = {name: visual._modules[name] for name in _OPEN_CLIP.stem}
    half = twin(visual, {})
    half._modules = {**held, "transformer": twin(visual.transformer, {"resblocks": nn.ModuleList(blocks[:count])})}
    half._parameters = {name: each for name, each in visual._parameters.items() if name != "proj"}
    made: nn.Module = half
    return made


def visual_above(visual: Any, count: int) -> nn.Module:
    """An image tower of open_clip's own that takes what its block number `count` returns in the place of pictures.

    Raises:
        LookupError: it is no plain ViT.
    """
    blocks = _vit_blocks(visual)
    half = twin(visual, {"transformer": twin(visual.transformer, {"resblocks": nn.ModuleList(blocks[count:])})})
    half._embeds = _unchanged
    made: nn.Module = half
    return made


def _vit_blocks(visual: Any) -> Sequence[nn.Module]:
    if not all(name in visual._modules for name in (*_OPEN_CLIP.stem, "transformer")):
        raise LookupError("blocks")
    return tuple(visual.transformer.resblocks)


def encoder_below(model: Any, count: int) -> nn.Module:
    """A tower of transformers whose last hidden state is what its block number `count` returns.

    Raises:
        LookupError: its blocks are not in one list.
    """

    def kept(name: str, child: nn.Module) -> nn.Module:
        return child if name in _STEMS or not any(True for _ in child.parameters()) else nn.Identity()

    return _with_blocks(model, path_of_blocks(model), slice(count), kept)


def encoder_above(model: Any, count: int, middle: Tensor) -> nn.Module:
    """A tower of transformers whose block number `count` has returned this, whatever is given as input.

    Raises:
        LookupError: its blocks are not in one list.
    """

    def kept(name: str, child: nn.Module) -> nn.Module:
        if name not in _STEMS:
            return child
        stem = copy(child)
        stem.forward = _unchanged if name != "embeddings" else _always(middle)
        return stem

    return _with_blocks(model, path_of_blocks(model), slice(count, None), kept)


def _with_blocks(module: Any, path: Sequence[str], part: slice, kept: Any) -> nn.Module:
    """A shallow copy with a part of the blocks that `path` leads to; other children as `kept` says."""
    if not path:
        return nn.ModuleList([*module][part])
    children = {
        name: _with_blocks(child, path[1:], part, kept) if name == path[0] else kept(name, child)
        for name, child in module._modules.items()
        if child is not None
    }
    made: nn.Module = twin(module, children)
    return made


def _unchanged(value: Tensor) -> Tensor:
    return value


def _always(value: Tensor) -> Any:
    def answer(*_: Any, **__: Any) -> Tensor:
        return value

    return answer

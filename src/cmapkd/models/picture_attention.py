"""What the class token of an image tower attends to in one block, read where torch's fused attention is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cmapkd.config import ConfigError
from cmapkd.models.base import DualEncoder


def check_blocks(model: DualEncoder, level: str) -> nn.Module:
    """The block that returns a level.

    Raises:
        ConfigError: the tower is no plain ViT, whose levels are its blocks.
    """
    names = [info.name for info in model.image_levels]
    if len(model.image_blocks) != len(names):
        raise ConfigError(
            f"the image tower of {model.name} is no plain ViT, so nobody sees what its class token attends to: take "
            "a ViT, or set method.token_weights=equal"
        )
    return model.image_blocks[names.index(level)]


@contextmanager
def attention_in(block: nn.Module) -> Iterator[list[Float[Tensor, "batch heads tokens tokens"]]]:
    """Attention maps of a block, of each forward pass inside this context; none where no fused attention is called."""
    found: list[Tensor] = []
    fused, fast = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()

    def attend(query: Tensor, key: Tensor, *others: Any, **named: Any) -> Tensor:
        scale = named.get("scale") or query.shape[-1] ** -0.5
        found.append((scale * query.float() @ key.float().transpose(-2, -1)).softmax(-1))
        output: Tensor = fused(query, key, *others, **named)
        return output

    def enter(*_call: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(False)  # which calls no function that could be watched
        F.scaled_dot_product_attention = attend

    def leave(*_call: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(fast)
        F.scaled_dot_product_attention = fused

    handles = [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        yield found
    finally:
        leave()
        for handle in handles:
            handle.remove()


def has_class_token(model: DualEncoder, prefix: int) -> bool:
    """Whether the first of so many prefix tokens of an image tower is a class token: of some ViTs all are registers."""
    if not prefix:
        return False
    towers = model.modules()  # of timm: the others with registers have a class token before them
    return not any(_has(tower, "reg_token") and not _has(tower, "cls_token") for tower in towers)


def _has(tower: nn.Module, name: str) -> bool:
    return isinstance(getattr(tower, name, None), Tensor)


def looked_at(
    maps: Sequence[Float[Tensor, "batch heads tokens tokens"]], prefix: int, name: str, *, by_class: bool
) -> Float[Tensor, "batch patches"]:
    """What the class token attends to among the patches, the mean of its heads.

    Of a tower without one, what all patches attend to, their mean. What is left out goes to prefix tokens.

    Args:
        maps: of one forward pass of one block.
        prefix: how many tokens stand in front of the patches.
        by_class: whether the first of them is a class token.
        name: of the tower, for the message.
    Raises:
        ConfigError: no attention was found.
    """
    if len(maps) != 1:
        raise ConfigError(
            f"attention of {name} cannot be read: its block calls torch's fused attention {len(maps)} times, not once. "
            "Load it with sdpa, or set method.token_weights=equal"
        )
    asked = maps[0][:, :, :1] if by_class else maps[0][:, :, prefix:]
    return asked.mean((1, 2))[:, prefix:]

"""An image tower that computes some of a picture's tokens alone: the others leave before its first block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmapkd.models.base import DualEncoder
from cmapkd.models.block_hooks import block_hooks
from cmapkd.models.texts import evaluating


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """The tokens of a plain ViT: class and register tokens first, then a grid of patches row by row."""

    num_prefix: int
    grid: tuple[int, int]
    width: int

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]


def token_grid(model: DualEncoder) -> TokenGrid:
    """The tokens of a model's image tower, once it has shown that it works with fewer.

    Raises:
        ValueError: the tower is no plain ViT, or counts its tokens.
    """
    blocks = model.image_blocks
    if not blocks or len(blocks) != len(model.image_levels):
        raise ValueError(
            f"the image tower of {model.name} cannot leave tokens out: it is no plain ViT (convolutional, windowed, or "
            "with positions inside its blocks). Choose a ViT, for example open_clip:ViT-B-32 or tiny:base."
        )
    first, size, device = model.image_levels[0], model.image_spec.size, model.log_logit_scale.device
    pixels = model.log_logit_scale.new_zeros(1, 3, size, size)
    with evaluating(model, device, None):
        level = model.encode_image(pixels, (first.name,)).levels[first.name]
        assert level.grid is not None
        tokens = TokenGrid(level.num_prefix, level.grid, first.width)
        try:  # a tower may count its tokens where nobody told us
            with only_visible(model, tokens, torch.zeros(1, 1, dtype=torch.int64, device=device)):
                model.encode_image(pixels)
        except (RuntimeError, AssertionError, IndexError) as error:
            raise ValueError(
                f"the image tower of {model.name} does not work with fewer tokens than its own: {error}"
            ) from None
    return tokens


@contextmanager
def only_visible(
    model: DualEncoder, tokens: TokenGrid, keep: Int[Tensor, "batch visible"]
) -> Iterator[dict[int, Float[Tensor, "batch prefix_and_visible width"]]]:
    """While the context is open, the blocks of a model's image tower work on prefix tokens and the kept cells alone.

    Levels of the model have no places then: read what the context gives, each block's output by the block's number.

    Args:
        tokens: of `token_grid`.
        keep: which cells, by number row by row; as many for each sample.
    Raises:
        ValueError: within it, the tower has other tokens than `tokens` says, as with patch dropout.
    """
    seen: dict[int, Tensor] = {}
    blocks, prefix = model.image_blocks, tokens.num_prefix

    def leave(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Float[Tensor, "batch tokens width"] = inputs[0]
        if x.shape[1] != prefix + tokens.cells:
            raise ValueError(
                f"the image tower of {model.name} has {x.shape[1]} tokens where {prefix} and {tokens.cells} cells were "
                "expected: set patch_dropout to 0"
            )
        cells = x[:, prefix:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        return (torch.cat([x[:, :prefix], cells], dim=1), *inputs[1:])

    def note(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            x: Tensor = output[0] if isinstance(output, tuple) else output
            seen[number] = x[:, : prefix + keep.shape[1]]  # prompts may stand behind

        return hook

    after = {block: note(number) for number, block in enumerate(blocks)}
    with block_hooks(after=after, before={blocks[0]: leave}):
        yield seen


def visible_pixels(
    images: Float[Tensor, "batch 3 height width"], keep: Int[Tensor, "batch visible"], grid: tuple[int, int]
) -> Float[Tensor, "batch 3 height width"]:
    """The pictures with zeros, the mean colour after normalisation, outside of the kept cells.

    A stem of convolutions would else see what its neighbours hide.
    """
    rows, columns = grid
    height, width = images.shape[-2] // rows, images.shape[-1] // columns
    shown = torch.zeros(len(images), rows * columns, dtype=torch.bool, device=images.device).scatter_(1, keep, True)
    pixels = shown.view(-1, rows, columns).repeat_interleave(height, 1).repeat_interleave(width, 2)
    margin = (0, images.shape[-1] - columns * width, 0, images.shape[-2] - rows * height)
    return images.masked_fill(~F.pad(pixels, margin)[:, None], 0.0)

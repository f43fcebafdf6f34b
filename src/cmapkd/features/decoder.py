"""A masked autoencoder's decoder: from the visible tokens of a picture to the pixels of all of its cells."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmapkd.models.tiny import HEAD_WIDTH, Block


class MaskedDecoder(nn.Module):
    """Visible tokens and one learned token for all hidden cells, with fixed positions, through a few blocks.

    It belongs to a method and is trained with the student, but is no part of the student that is saved.

    Args:
        width: channels of the tower's tokens.
        grid: rows and columns of the picture's cells.
        values: numbers to predict for each cell.
        inner_width: channels of the blocks, a multiple of 32; None: two thirds of `width`, as 512 are of 768.
        depth: blocks, at least 1.

    Source: He et al. 2022 (MAE, arXiv:2111.06377), section 3 and appendix A.
    """

    positions: Tensor

    def __init__(
        self, width: int, grid: tuple[int, int], values: int, *, inner_width: int | None = None, depth: int
    ) -> None:
        super().__init__()
        inner = inner_width or max(1, round(2 * width / 3 / HEAD_WIDTH)) * HEAD_WIDTH
        if inner % HEAD_WIDTH or depth < 1:
            raise ValueError(
                f"a decoder of {depth} blocks of {inner} channels is asked for: give a depth of at least 1, and a "
                f"width that is a multiple of {HEAD_WIDTH}"
            )
        self.norm, self.embed = nn.LayerNorm(width), nn.Linear(width, inner)
        self.hidden = nn.Parameter(torch.randn(1, 1, inner) * 0.02)
        self.register_buffer("positions", sine_positions(grid, inner), persistent=False)
        self.blocks = nn.ModuleList(Block(inner) for _ in range(depth))
        self.norm_out, self.predict = nn.LayerNorm(inner), nn.Linear(inner, values)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed, as timm's modules list theirs."""
        return {"hidden"}

    def forward(
        self, tokens: Float[Tensor, "batch prefix_and_visible width"], keep: Int[Tensor, "batch visible"]
    ) -> Float[Tensor, "batch cells values"]:
        """What is predicted of every cell, visible ones too.

        Args:
            tokens: of the tower, prefix tokens first, then those of the cells `keep`.
            keep: numbers of the visible cells, row by row.
        """
        prefix, cells = tokens.shape[1] - keep.shape[1], self.positions.shape[1]
        x = self.embed(self.norm(tokens))
        every = self.hidden.to(x.dtype).expand(len(x), cells, -1)
        every = every.scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), x[:, prefix:])
        x = torch.cat([x[:, :prefix], every + self.positions.to(x.dtype)], dim=1)
        for block in self.blocks:
            x = block(x)
        predicted: Tensor = self.predict(self.norm_out(x[:, prefix:]))
        return predicted


def sine_positions(grid: tuple[int, int], width: int) -> Float[Tensor, "1 cells width"]:
    """Fixed positions: sines and cosines of a cell's row in one half of the channels, of its column in the other.

    Args:
        width: a multiple of 4.
    """
    rates = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = []
    for axis in (0, 1):
        places = torch.arange(grid[axis], dtype=torch.float64)
        angles = places[:, None] * rates
        shape = (grid[0], 1) if axis == 0 else (1, grid[1])
        halves.append(torch.cat([angles.sin(), angles.cos()], dim=1).view(*shape, -1).expand(*grid, -1))
    return torch.cat(halves, dim=-1).flatten(0, 1)[None].float()

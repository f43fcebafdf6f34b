"""How far a teacher's embeddings spread around their mean direction, as a run finds it out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmapkd.objectives.angle import angular_dispersion, squared_angle
from cmapkd.objectives.common import unit

SMALLEST = 1e-4  # radians squared: embeddings that are all the same have no spread to divide by


class Dispersion(nn.Module):
    """The mean squared angle of embeddings to their mean direction, over all that were noted.

    While a run notes batch after batch, each batch is compared with the mean direction of all so far, its own included.
    So the first batches are compared with a direction that is not yet the final one. `fill` has no such error. All of
    it is in checkpoints.

    Args:
        dim: width of the embeddings.
    """

    total: Float[Tensor, " dim"]
    squares: Float[Tensor, ""]
    number: Float[Tensor, ""]
    batches: Int[Tensor, ""]

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(dim))
        self.register_buffer("squares", torch.zeros(()))
        self.register_buffer("number", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def note(self, embeddings: Float[Tensor, "batch dim"], *, batches: int) -> None:
        """Takes note of a batch, of all processes' samples, unless so many batches were noted before."""
        rows, open_yet = unit(embeddings), self.batches < batches  # on the device: the host need not know
        total = self.total + rows.sum(0)
        squares = squared_angle(rows, total.to(rows.dtype).expand_as(rows)).sum()
        self.total.copy_(torch.where(open_yet, total, self.total))
        self.squares += torch.where(open_yet, squares, 0.0)
        self.number += len(rows) * open_yet
        self.batches += open_yet

    @torch.no_grad()
    def fill(self, parts: Iterable[Float[Tensor, "part dim"]]) -> None:
        """Holds the dispersion of these embeddings, exactly, in place of what was noted before."""
        rows = unit(torch.cat([*parts]))
        self.total.copy_(rows.sum(0))
        self.number.fill_(len(rows))
        self.squares.copy_(angular_dispersion(rows) * len(rows))

    @property
    def value(self) -> Float[Tensor, ""]:
        """Radians squared, without gradient; `SMALLEST` at least, also before anything was noted."""
        return (self.squares / self.number.clamp_min(1)).clamp_min(SMALLEST)

"""Pictures that a build has answered already: where views differ in their captions alone, each is encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cmapkd.cache.layout import RowLayout

LIMIT = 2**29  # bytes of answers that are kept; later pictures are encoded in every view


class KnownPictures:
    """Answers to pictures by sample, the first ones that fit; nothing kept is dropped, see `data.memory`."""

    def __init__(self, layout: RowLayout, limit: int = LIMIT) -> None:
        self.names = tuple(field.name for field in layout.fields if field.tower == "image")
        self.room = limit
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def find(self, samples: Sequence[int], device: torch.device) -> dict[str, Tensor] | None:
        """The arrays [batch ...] of these samples' pictures by field; None unless all of them are known."""
        if not all(sample in self._kept for sample in samples):
            return None
        rows = [self._kept[sample] for sample in samples]
        return {
            name: torch.stack(parts).to(device) for name, parts in zip(self.names, zip(*rows, strict=True), strict=True)
        }

    def keep(self, samples: Sequence[int], arrays: Mapping[str, Tensor]) -> None:
        """Keeps what there is room for of the answers [batch ...] to these samples' pictures."""
        columns = [arrays[name].cpu() for name in self.names]
        size = sum(column[0].nbytes for column in columns)
        for row, sample in enumerate(samples):
            if sample not in self._kept and size <= self.room:
                self.room -= size
                self._kept[sample] = tuple(column[row].clone() for column in columns)

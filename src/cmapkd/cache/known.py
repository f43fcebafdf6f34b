"""Pictures that a build has answered already: where views differ in their captions alone, each is encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cmapkd.cache.layout import RowLayout
from cmapkd.cache.rows import live_features
from cmapkd.data.types import ModelInput
from cmapkd.models import FrozenTeacher

LIMIT = 2**29  # bytes of answers that are kept; later pictures are encoded in every view


class KnownPictures:
    """Answers to pictures by sample, the first ones that fit; nothing kept is dropped, see `data.memory`."""

    def __init__(self, layout: RowLayout, limit: int = LIMIT) -> None:
        self.layout = layout
        self.of_texts = replace(layout, fields=tuple(field for field in layout.fields if field.tower != "image"))
        self.names = tuple(field.name for field in layout.fields if field.tower == "image")
        self.room = limit
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def ask(
        self, teacher: FrozenTeacher, inputs: ModelInput, precision: str, samples: Sequence[int]
    ) -> dict[str, Tensor]:
        """The answers by field, [batch ...]; pictures that were answered in another view are not encoded again."""
        found = self.find(samples, inputs.texts.ids.device)
        if found is not None:
            needs = replace(self.layout.needs, image_levels=(), towers=("text",))
            return {
                **found,
                **self.of_texts.arrays(live_features(teacher, inputs, needs, precision), inputs.texts),
            }
        live = self.layout.ask(teacher, inputs, precision)
        self.keep(samples, live)
        return live

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

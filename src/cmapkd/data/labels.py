"""Labels of samples, for methods that read them: an `Extra` of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from cmapkd.config import ConfigError, counted
from cmapkd.data.random import uniforms
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.data.unseen import unseen
from cmapkd.data.views import View

NO_LABEL = -1

_LOOKED_AT = 64  # samples among which one must have a label


@dataclass(frozen=True, slots=True)
class LabelReader:
    """One number for each sample, -1 where it has no label, or where its label is hidden.

    Attributes:
        share: fraction of the samples whose label is shown. Their ids alone decide which ones, so they are the same in
            every epoch, run and process, and a larger share shows all that a smaller one does.
        num_classes: how many classes the labels are numbers of; None: not checked.
    """

    share: float = 1.0
    num_classes: int | None = None

    def read(self, sample: Sample, view: View, epoch: int) -> int:  # noqa: ARG002  the same in every view and epoch
        if sample.label is None or (self.share < 1 and uniforms(1, "label", sample.id)[0] >= self.share):
            return NO_LABEL
        if self.num_classes is not None and sample.label >= self.num_classes:
            raise ConfigError(
                f"sample {sample.id!r} has label {sample.label}, but there are only "
                f"{counted(self.num_classes, 'class')}: give the class names that the labels were numbered by"
            )
        return sample.label

    def join(self, items: Sequence[int]) -> Int[Tensor, " batch"]:
        return torch.tensor(items, dtype=torch.long)


def any_label(source: Source) -> bool:
    """Whether one of a few samples, spread evenly over the source, has a label; pictures are not looked at."""
    for index in range(0, len(source), max(1, len(source) // _LOOKED_AT)):
        try:
            if unseen(source, index).label is not None:
                return True
        except BadSampleError:
            continue
    return False

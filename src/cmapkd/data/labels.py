"""Labels of samples, for methods that read them: an `Extra` of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from cmapkd.config import ConfigError, closest, counted
from cmapkd.data.picked import Unlabelled
from cmapkd.data.random import uniforms
from cmapkd.data.streams import JoinedSource
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.data.unseen import unseen
from cmapkd.data.views import View

NO_LABEL = -1

_LOOKED_AT = 64  # samples that are looked at first
_MOST_READ = 100_000  # samples of a source that are all looked at, before it is said to have no label


@dataclass(frozen=True, slots=True)
class LabelReader:
    """One number for each sample, -1 where it has no label, or where its label is hidden.

    Attributes:
        share: fraction of the samples whose label is shown. Their ids alone decide which ones, so they are the same in
            every epoch, run and process, and a larger share shows all that a smaller one does.
        num_classes: how many classes the labels are numbers of; None: not checked.
    """

    of_sample: ClassVar[bool] = True
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


def places_among(names: Sequence[str], *, left_out: Sequence[str]) -> Int[Tensor, " classes"]:
    """Of each class its place among those that are not left out, or -1.

    Raises:
        ConfigError: there is no class of a name, or fewer than two are left.
    """
    for name in left_out:
        if name not in names:
            raise ConfigError(f"method.left_out names {name!r}{closest(name, names)}, which is no class of the data")
    kept = [number for number, name in enumerate(names) if name not in left_out]
    if len(kept) < 2:
        told = ", ".join(names[number] for number in kept) or "none"
        raise ConfigError(f"the method tells classes apart, and the data have {told}: give data with more classes")
    places = torch.full((len(names),), NO_LABEL)
    places[kept] = torch.arange(len(kept))
    return places


def any_label(source: Source) -> bool:
    """Whether a sample of the source has a label; pictures are not looked at where the source can be read without them.

    A few samples, spread evenly, are looked at first, and then all. Of a source that is too large for it, and does not
    hide its labels, the answer is yes.
    """
    if isinstance(source, Unlabelled):
        return False
    if isinstance(source, JoinedSource):
        return any(any_label(each) for each in source.shown)
    if _one_of(source, range(0, len(source), max(1, len(source) // _LOOKED_AT))):
        return True
    return len(source) > _MOST_READ or _one_of(source, range(len(source)))


def _one_of(source: Source, places: Iterable[int]) -> bool:
    """Whether one of the samples at these places has a label; bad ones have none."""
    for index in places:
        try:
            if unseen(source, index).label is not None:
                return True
        except BadSampleError:
            continue
    return False

"""Which samples of a batch show the same picture: an `Extra` of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from jaxtyping import Int
from torch import Tensor

from cmapkd.data.types import Sample
from cmapkd.data.views import View


@dataclass(frozen=True, slots=True)
class PictureReader:
    """A number for each picture, made of its size and pixels, so that it needs no name that samples share.

    Tables with a line for each caption, and data sets that hold a picture under several names, bring one picture more
    than once.
    """

    of_sample = True

    def read(self, sample: Sample, view: View, epoch: int) -> int:  # noqa: ARG002  the same in every view and epoch
        digest = blake2b(repr(sample.image.size).encode(), digest_size=8)
        digest.update(sample.image.tobytes())
        return int.from_bytes(digest.digest(), "little", signed=True)

    def join(self, items: Sequence[int]) -> Int[Tensor, " batch"]:
        return torch.tensor(items, dtype=torch.int64)

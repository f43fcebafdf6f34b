"""Samples without their pictures, for passes over what is said of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from PIL import Image

from cmapkd.data.types import Sample, Source

_KEPT = 100_000  # samples
NO_PICTURE = Image.new("RGB", (1, 1))
"""In the place of a picture that nobody looks at, and of one that a dialogue does not have."""


def unseen(source: Source, index: int) -> Sample:
    """The sample at `index`, with a dot in the place of its picture where the source can read it so (`unseen(index)`).

    Raises:
        BadSampleError: it cannot be read.
    """
    own: Any = getattr(source, "unseen", None)
    sample: Sample = source[index] if own is None else own(index)
    return sample


class UnseenSamples:
    """Samples of a source without their pictures and boxes.

    Those that are asked first are kept: reading their texts again would cost more than reading stored answers.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._known: dict[int, Sample] = {}

    def __getitem__(self, index: int) -> Sample:
        known = self._known.get(index)
        if known is None:
            known = replace(unseen(self.source, index), boxes=())
            if len(self._known) < _KEPT:
                self._known[index] = known
        return known

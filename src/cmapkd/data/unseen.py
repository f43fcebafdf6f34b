"""Samples without their pictures, for passes over what is said of them."""

from __future__ import annotations

from typing import Any

from PIL import Image

from cmapkd.data.types import Sample, Source

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

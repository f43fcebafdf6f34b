"""`FastPixels`: a model's pixels by torch's resampling of bytes, which is faster than Pillow's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from cmapkd.models.images import ImageSpec

_FAST = ("bicubic", "bilinear")  # filters that torch applies to bytes


@dataclass(frozen=True, slots=True)
class FastPixels:
    """Reads a picture as `spec` does, but a crop is rounded to whole pixels and cut out before it is resized.

    So its edges look at no pixel outside, as with torchvision's `RandomResizedCrop`; Pillow's filter does. Where Pillow
    cuts out the same crop, too, a few values in a million differ by more than 1 of 255, because torch rounds its sums
    otherwise. Other filters than bicubic and bilinear are Pillow's own.
    """

    spec: ImageSpec

    @property
    def raw_form(self) -> Any:
        """Equal where `raw` is."""
        return *self.spec.raw_form, "fast"

    def raw(
        self, image: Image.Image, box: tuple[float, float, float, float] | None = None
    ) -> UInt8[Tensor, "3 size size"]:
        """The numbers 0 to 255 of `image` (RGB), or of its part in `box`, at this model's size."""
        spec = self.spec
        if spec.interpolation not in _FAST:
            return spec.raw(image, box)
        if box is None and spec.fit == "crop":
            (width, height), (left, top) = spec.central_square(image.size)
            scaled = self._resized(image, (0, 0, *image.size), width, height)
            return scaled[:, top : top + spec.size, left : left + spec.size].clone()
        return self._resized(image, box or (0, 0, *image.size), spec.size, spec.size)

    def _resized(self, image: Image.Image, box: tuple[float, ...], width: int, height: int) -> Tensor:
        """UInt8[3 height width] of the part in `box`, rounded to whole pixels, at least one of them."""
        left, top = (min(round(edge), length - 1) for edge, length in zip(box[:2], image.size, strict=True))
        right, bottom = max(round(box[2]), left + 1), max(round(box[3]), top + 1)
        pixels = torch.from_numpy(np.asarray(image)[top:bottom, left:right].copy()).permute(2, 0, 1)
        if pixels.shape[1:] != (height, width):
            pixels = F.interpolate(pixels[None], (height, width), mode=self.spec.interpolation, antialias=True)[0]
        return pixels.contiguous()

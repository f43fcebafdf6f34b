"""A model's own image preprocessing: size, resampling and normalisation, applied to a whole picture or to a view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How one model wants its pixels.

    Attributes:
        size: height and width of the square input, in pixels.
        mean, std: per channel, of pixels in [0, 1].
        interpolation: resampling filter (antialiased when shrinking).
        fit: what happens to a picture that is not square when no view is given: `crop` resizes the short side and
            takes the centre (CLIP), `squash` resizes both sides (SigLIP).
    """

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP, arXiv:2103.00020, official code
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = "bicubic"
    fit: Literal["crop", "squash"] = "crop"

    def pixels(self, image: Image.Image, box: tuple[float, float, float, float] | None = None) -> Image.Image:
        """`image` (RGB) at this model's size; `box` is the view's crop: left, top, right, bottom in pixels."""
        if box is None and self.fit == "crop":
            return self._centre(image)
        if image.size == (self.size, self.size) and (box is None or box == (0, 0, *image.size)):
            return image
        return image.resize((self.size, self.size), _RESAMPLING[self.interpolation], box=box)

    def _centre(self, image: Image.Image) -> Image.Image:
        """Short side to `size`, long side in proportion (rounded down), then the central square: CLIP's own order."""
        width, height = image.size
        if (width, height) == (self.size, self.size):
            return image
        if width <= height:
            width, height = self.size, int(self.size * height / width)
        else:
            width, height = int(self.size * width / height), self.size
        image = image.resize((width, height), _RESAMPLING[self.interpolation])
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))

    def normalise(self, image: Image.Image) -> Float[Tensor, "3 size size"]:
        """Pixels of a picture already at this size to the model's normalised float32 tensor."""
        # made contiguous while a pixel is still a byte, then changed in place: half the time of whole new arrays
        array = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)
        mean, std = (np.asarray(v, dtype=np.float32)[:, None, None] for v in (self.mean, self.std))
        array /= np.float32(255)
        array -= mean
        array /= std
        return torch.from_numpy(array)

    def __call__(
        self, image: Image.Image, box: tuple[float, float, float, float] | None = None
    ) -> Float[Tensor, "3 size size"]:
        """The model's input for `image`, or for the part of it that `box` cuts out."""
        return self.normalise(self.pixels(image, box))

"""A model's own image preprocessing: size, resampling and normalisation, applied to a whole picture or to a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

_EXACT = frozenset({"cpu"})  # kinds of devices whose float32 division rounds as IEEE 754 says
_TABLES: dict[tuple[tuple[float, ...], tuple[float, ...], torch.device], Tensor] = {}

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
        if image.size == (self.size, self.size):
            return image
        scaled, (left, top) = self.central_square(image.size)
        image = image.resize(scaled, _RESAMPLING[self.interpolation])
        return image.crop((left, top, left + self.size, top + self.size))

    def central_square(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Short side to `size`, long side in proportion (rounded down), then the central square: CLIP's own order.

        Args:
            size: width and height of a picture.
        Returns:
            Width and height to resize to, and where the square begins there, from left and from top.
        """
        width, height = size
        if width <= height:
            width, height = self.size, int(self.size * height / width)
        else:
            width, height = int(self.size * width / height), self.size
        return (width, height), (round((width - self.size) / 2), round((height - self.size) / 2))

    def raw(
        self, image: Image.Image, box: tuple[float, float, float, float] | None = None
    ) -> UInt8[Tensor, "3 size size"]:
        """`pixels` as numbers 0 to 255, not normalised: how pictures travel from data workers to a device."""
        return torch.from_numpy(np.array(np.asarray(self.pixels(image, box)).transpose(2, 0, 1), order="C"))

    @property
    def raw_form(self) -> tuple[int, str, str]:
        """Equal where `raw` is: specs that differ in mean and std alone read the same numbers."""
        return self.size, self.interpolation, self.fit

    def to_model(
        self, images: UInt8[Tensor, "*batch 3 height width"] | Float[Tensor, "*batch 3 height width"]
    ) -> Float[Tensor, "*batch 3 height width"]:
        """What a tower reads, on the device of `images`.

        Args:
            images: numbers 0 to 255 (`raw`), which become float32 (value / 255 - mean) / std, each step rounded, the
                same on every device; or floating-point pixels, which are normalised already and stay as they are.
        Raises:
            TypeError: pixels of another kind.
        """
        if images.is_floating_point():
            return images
        if images.dtype != torch.uint8:
            raise TypeError(
                f"pixels are {images.dtype}: give uint8 from 0 to 255 (image_spec.raw), or floating-point pixels that "
                "are normalised already (image_spec(picture))"
            )
        if images.device.type in _EXACT:
            return _normalised(images, self.mean, self.std)
        return looked_up(images, _table(self.mean, self.std, images.device))

    def __call__(
        self, image: Image.Image, box: tuple[float, float, float, float] | None = None
    ) -> Float[Tensor, "3 size size"]:
        """The model's input for `image`, or for the part of it that `box` cuts out: normalised, in float32."""
        return self.to_model(self.raw(image, box))


def looked_up(
    images: UInt8[Tensor, "*batch 3 height width"], table: Float[Tensor, "3 256"]
) -> Float[Tensor, "*batch 3 height width"]:
    """`table[channel, value]` of every value: exact on any device, however that divides."""
    channels = torch.arange(0, table.numel(), 256, dtype=torch.int32, device=images.device)[:, None, None]
    places = images.to(torch.int32) + channels
    return table.flatten().index_select(0, places.flatten()).view(images.shape)


def _normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """By IEEE division, as the CPU does it; other devices may multiply by a rounded reciprocal."""
    number, mean_of, std_of = (
        torch.tensor(values, dtype=torch.float32, device=images.device)[:, None, None]
        for values in ([255.0], mean, std)
    )
    return images.to(torch.float32).div_(number).sub_(mean_of).div_(std_of)


def _table(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Float[Tensor, "3 256"]:
    """The 256 values of each channel on a device, computed on the CPU and moved there once."""
    key = mean, std, device
    if key not in _TABLES:
        values = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
        _TABLES[key] = _normalised(values, mean, std).view(3, 256).to(device)
    return _TABLES[key]

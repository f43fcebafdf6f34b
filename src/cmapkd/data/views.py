"""Views: a crop, a flip and a colour change that are pure functions of (sample id, view number, spec).

So a view is the same in every worker, process and run: a cache can store the teacher's answer to it without storing any
augmentation parameters, and resume needs no augmentation state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from PIL import Image, ImageEnhance
from pydantic import Field, model_validator

from cmapkd.config import Config, ConfigError, closest
from cmapkd.data.random import uniforms
from cmapkd.data.types import MAIN_VIEW

CropBox = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


class ViewSpec(Config):
    """What may happen to a picture before it reaches teacher and student alike."""

    crop_scale: tuple[float, float] = Field(
        (0.9, 1.0), description="Smallest and largest area of the crop, as a share of the picture; [1, 1] for no crop."
    )
    crop_ratio: tuple[float, float] = Field(
        (0.75, 4 / 3), description="Smallest and largest width over height of the crop."
    )
    flip: float = Field(
        0.0, ge=0, le=1, description="Probability of a mirror image; it makes 'left' wrong in captions."
    )
    jitter: float = Field(
        0.0, ge=0, le=1, description="Largest relative change of brightness, contrast and saturation."
    )
    num_views: int | None = Field(
        None,
        ge=1,
        description="Number of distinct views of a sample, cycled over epochs; none for a new one each epoch.",
    )
    reading: Literal["exact", "fast"] = Field(
        "exact",
        description="How models of two towers resize training pictures. exact: by Pillow, as in evaluation; fast: by "
        "torch, in less time, in crops of whole pixels whose edges are computed otherwise.",
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must satisfy 0 < smallest <= largest <= 1, got {list(self.crop_scale)}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must satisfy 0 < smallest <= largest, got {list(self.crop_ratio)}")
        return self

    @property
    def whole(self) -> bool:
        """Whether every view is the whole picture, unchanged."""
        return self.crop_scale == (1.0, 1.0) and not self.flip and not self.jitter

    def view_number(self, epoch: int) -> int:
        """Which view a sample shows in `epoch`."""
        return epoch if self.num_views is None else epoch % self.num_views

    @property
    def shows_all(self) -> bool:
        """Whether every view of a sample shows its picture as it is, so that views differ in their captions alone."""
        return self.crop_scale == (1.0, 1.0) and not self.flip and not self.jitter

    def fingerprint(self) -> str:
        """What a view's random numbers depend on besides id and number: the ranges they are used for."""
        return f"{self.crop_scale}{self.crop_ratio}{self.flip}{self.jitter}"


WHOLE = ViewSpec(crop_scale=(1.0, 1.0))


class WholePictures(ViewSpec):
    """The captions of other views, each beside the picture as it is: what a teacher may see of them."""

    @classmethod
    def of(cls, views: ViewSpec, *, once: bool) -> Self:
        """The views of these.

        Args:
            once: whether all of a sample's are the first one, since nobody reads its captions.
        """
        return cls.model_validate(views.model_dump() | ({"num_views": 1} if once else {}))

    @property
    def whole(self) -> bool:
        return True

    @property
    def shows_all(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class View:
    """The drawn parameters of one view; `box` is None for the whole picture under the model's own fit."""

    box: CropBox | None = None
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    caption: float = 0.0  # in [0, 1): which of the captions this view is paired with

    def prepare(self, image: Image.Image) -> tuple[Image.Image, CropBox | None]:
        """The picture after colour change and flip, and the crop in its coordinates; each model resizes from there."""
        for enhancer, factor in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        ):
            if factor != 1.0:
                image = enhancer(image).enhance(factor)
        if not self.flip:
            return image, self.box
        box = self.box and (image.width - self.box[2], self.box[1], image.width - self.box[0], self.box[3])
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), box

    def choose(self, captions: tuple[str, ...]) -> str:
        """The caption of this view."""
        return captions[int(self.caption * len(captions))]


def draw_view(sample_id: str, number: int, spec: ViewSpec, size: tuple[int, int]) -> View:
    """View `number` of a sample whose picture has `size` = (width, height) pixels.

    The crop follows the usual random-resized crop: a random area and aspect ratio at a random place; if the shape does
    not fit into the picture, its sides are clipped to it.
    """
    return _view_of(uniforms(9, "view", sample_id, number, spec.fingerprint()).tolist(), spec, size)


def draw_more_view(sample_id: str, number: int, name: str, place: int, spec: ViewSpec, size: tuple[int, int]) -> View:
    """Further view `place` (0, 1, ...) of the kind `name`, shown beside view `number` of a sample; see `draw_view`."""
    return _view_of(uniforms(9, "view", sample_id, number, spec.fingerprint(), name, place).tolist(), spec, size)


def check_more_views(asked: Mapping[str, int], specs: Mapping[str, ViewSpec]) -> None:
    """Refuses further views that the recipe does not describe.

    Args:
        asked: by a method, how many views of each name of a sample.
        specs: the recipe's `data.more_views`.
    Raises:
        ConfigError: a name has no spec.
        ValueError: a number is below 1, or the name is that of the main view.
    """
    for name, count in asked.items():
        if name == MAIN_VIEW or count < 1:
            raise ValueError(
                f"more_views asks for {count} views {name!r}: ask for at least 1, of another name than main"
            )
        if name not in specs:
            known = ", ".join(specs) or "none"
            raise ConfigError(
                f"this run reads {count} further views {name!r} of each sample, which data.more_views does not describe"
                f"{closest(name, specs)} (described: {known}): add for example "
                f"data.more_views: {{{name}: {{crop_scale: [0.3, 1.0]}}}}"
            )


def _view_of(drawn: Sequence[float], spec: ViewSpec, size: tuple[int, int]) -> View:
    area, ratio, left, top, flip, brightness, contrast, saturation, caption = drawn
    box: CropBox | None = None
    if spec.crop_scale != (1.0, 1.0):
        width, height = size
        wanted = width * height * _between(spec.crop_scale, area)
        low, high = (math.log(value) for value in spec.crop_ratio)
        aspect = math.exp(_between((low, high), ratio))
        crop_width, crop_height = min(math.sqrt(wanted * aspect), width), min(math.sqrt(wanted / aspect), height)
        x, y = left * (width - crop_width), top * (height - crop_height)
        box = (x, y, x + crop_width, y + crop_height)
    if isinstance(spec, WholePictures):
        return View(caption=caption)
    change = (1 - spec.jitter, 1 + spec.jitter)
    return View(
        box=box,
        flip=flip < spec.flip,
        brightness=_between(change, brightness),
        contrast=_between(change, contrast),
        saturation=_between(change, saturation),
        caption=caption,
    )


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share

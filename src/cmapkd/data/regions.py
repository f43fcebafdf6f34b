"""Further views of a sample: random crops, or the boxes of its objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.random import uniforms
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.data.views import CropBox, View, ViewSpec, draw_more_view

_LOOKED_AT = 64  # samples in which a box must be found at least once


class FurtherViewSpec(ViewSpec):
    """What a further view shows of a picture."""

    of: Literal["picture", "boxes"] = Field(
        "picture",
        description="What is cropped. picture: a random part of it; boxes: objects by the boxes of the data, each "
        "once, and the whole picture where there are no more.",
    )

    @model_validator(mode="after")
    def _crops_of_boxes_are_boxes(self) -> Self:
        if self.of == "boxes" and self.changed("crop_scale", "crop_ratio"):
            raise ValueError("of: boxes crops objects by their boxes: leave crop_scale and crop_ratio out")
        return self


def further_view(sample: Sample, number: int, name: str, place: int, spec: ViewSpec) -> View:
    """Further view `place` (0, 1, ...) of the kind `name`, shown beside view `number` of a sample.

    Boxes come in an order that is drawn for the sample and `number`. Places behind the last one show the whole picture.
    """
    view = draw_more_view(sample.id, number, name, place, spec, sample.image.size)
    if not shows_boxes(spec):
        return view
    boxes = boxes_of(sample)
    if place >= len(boxes):
        return replace(view, box=None)
    order = uniforms(len(boxes), "boxes", sample.id, number, name).argsort(kind="stable")
    return replace(view, box=boxes[order[place]])


def shows_boxes(spec: ViewSpec) -> bool:
    """Whether the views are objects of the picture."""
    return isinstance(spec, FurtherViewSpec) and spec.of == "boxes"


def boxes_of(sample: Sample) -> list[CropBox]:
    """The parts of a sample's boxes inside its picture, of a pixel's size at least; no box around a crowd."""
    width, height = sample.image.size
    found = []
    for box in sample.boxes:
        left, top = max(box.x, 0.0), max(box.y, 0.0)
        right, bottom = min(box.x + box.width, width), min(box.y + box.height, height)
        if not box.crowd and right - left >= 1 and bottom - top >= 1:
            found.append((left, top, right, bottom))
    return found


@dataclass(frozen=True, slots=True)
class RegionReader:
    """How many of a sample's views are regions. An `Extra`, of the name of the view.

    Of random crops they are all. Of boxes they are as many as the sample has, or one: the whole picture.

    Attributes:
        most: views that a batch brings of each sample.
        boxes: whether the views show boxes, which `told_of_views` finds out.
    """

    most: int
    boxes: bool = True

    def read(self, sample: Sample, view: View, epoch: int) -> int:  # noqa: ARG002  the same in every view and epoch
        if not self.boxes:
            return self.most
        return min(max(1, len(boxes_of(sample))), self.most)

    def join(self, items: Sequence[int]) -> Int[Tensor, " batch"]:
        return torch.tensor(items, dtype=torch.long)


def told_of_views(extras: Mapping[str, Any], specs: Mapping[str, ViewSpec]) -> dict[str, Any]:
    """What a batch brings by name, where each `RegionReader` knows whether the view of its name shows boxes."""
    told = dict(extras)
    for name, each in extras.items():
        if isinstance(each, RegionReader) and name in specs:
            told[name] = replace(each, boxes=shows_boxes(specs[name]))
    return told


def check_boxes(source: Source, asked: Mapping[str, int], specs: Mapping[str, ViewSpec]) -> None:
    """Refuses data without boxes where views are made of these.

    Args:
        asked: by a method, how many views of each name; `specs`: the recipe's `data.more_views`.
    Raises:
        ConfigError: none of some samples, spread evenly over the source, has a box.
    """
    needed = [name for name in asked if name in specs and shows_boxes(specs[name])]
    if needed and not _any_box(source):
        raise ConfigError(
            f"data.more_views.{needed[0]} shows objects by their boxes, but none of {_LOOKED_AT} samples of "
            f"{source.name} has a box: take data with boxes (docs/data.md), or set "
            f"data.more_views.{needed[0]}.of=picture"
        )


def _any_box(source: Source) -> bool:
    for index in range(0, len(source), max(1, len(source) // _LOOKED_AT)):
        try:
            if boxes_of(source[index]):
                return True
        except BadSampleError:  # the training meets it again
            continue
    return False

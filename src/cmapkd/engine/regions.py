"""Regions of a picture: the data's boxes, as far as they can be asked about."""

from __future__ import annotations

from cmapkd.data.types import Sample
from cmapkd.engine.candidates import Corners


def regions_of(sample: Sample, most_area: float, *, alone: bool = True) -> list[Corners]:
    """Boxes within the picture, of a smaller share of it than `most_area`, in the data's order.

    Args:
        alone: only boxes whose name no other box of the picture bears.

    Source: `is_crop_valid` of inclusionAI/Zooming-without-Zooming@fdc0ba1, data_synthesis/create_questions.py.
    """
    names = [box.name for box in sample.boxes]
    some = [box for box in sample.boxes if not box.crowd and not (alone and names.count(box.name) > 1)]
    corners = [inside((box.x, box.y, box.x + box.width, box.y + box.height), sample.image.size) for box in some]
    small = [each for each in corners if is_small(each, sample.image.size, most_area)]
    return list(dict.fromkeys(small))  # two names at one place are one region


def inside(box: Corners, size: tuple[int, int]) -> Corners:
    """The part of a box that lies in the picture."""
    return max(0, box[0]), max(0, box[1]), min(size[0], box[2]), min(size[1], box[3])


def is_small(box: Corners, size: tuple[int, int], most_area: float = 0.1) -> bool:
    """Whether a box has an area, and less than this share of the picture's."""
    wide, high = box[2] - box[0], box[3] - box[1]
    return wide > 0 and high > 0 and wide * high / (size[0] * size[1]) < most_area

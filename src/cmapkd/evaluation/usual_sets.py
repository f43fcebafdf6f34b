"""The sets on which retrieval is usually reported, so that nobody compares a score on another set with them."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UsualSet:
    """A named data set: how its name is written, and how many images its usual splits have."""

    title: str
    name: re.Pattern[str]
    images: tuple[int, ...]  # 1,014 is the validation split of Flickr30k
    said: str


USUAL_SETS = (
    UsualSet("Flickr8k", re.compile(r"flickr[-_ ]?8k", re.IGNORECASE), (1000,), "1,000 images with 5,000 captions"),
    UsualSet(
        "Flickr30k", re.compile(r"flickr[-_ ]?30k", re.IGNORECASE), (1000, 1014), "1,000 images with 5,000 captions"
    ),
    UsualSet(
        "COCO", re.compile(r"(?<![a-z])(ms[-_ ]?)?coco(?![a-z])", re.IGNORECASE), (1000, 5000), "5,000 or 1,000 images"
    ),
)


def remark_on(source: str, *, num_images: int, num_texts: int) -> str | None:
    """What to know of a retrieval score on this source; None if its set is a usual one, or of no set that is known.

    Args:
        source: the source's name.
    """
    for usual in USUAL_SETS:
        if usual.name.search(source) and num_images not in usual.images:
            easier = "easier" if num_images < min(usual.images) else "harder"
            return (
                f"retrieval is over {num_images:,} images and {num_texts:,} captions, and results on {usual.title} are "
                f"usually of {usual.said}: this is {easier}, so do not compare the recall with theirs"
            )
    return None

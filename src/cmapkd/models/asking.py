"""Pictures and questions of any kind to dialogues, for whoever asks a model outside of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from PIL import Image

from cmapkd.data.turns import UNREAD, Dialogue, Turn
from cmapkd.models.embedding import Picture, opened


def dialogues(
    pictures: Picture | Iterable[Picture | None] | None, questions: str | Iterable[str]
) -> Iterator[tuple[Dialogue, list[Image.Image]]]:
    """Each question with its picture, as a processor reads them; pictures are opened one by one.

    One picture is asked every question. One question is asked about every picture.

    Args:
        pictures: one or many; None, also among many: the question has no picture.
    Raises:
        ValueError: there are several of both, and not as many of one as of the other.
        TypeError: a question is no text.
        FileNotFoundError, BadSampleError, TypeError: a picture cannot be opened; see `opened`.
    """
    one_picture = pictures is None or isinstance(pictures, str | os.PathLike | bytes | Image.Image)
    shown: Sequence[Picture | None] = [pictures] if one_picture else list(pictures)  # type: ignore[list-item,arg-type]
    asked = [questions] if isinstance(questions, str) else list(questions)
    if one_picture:
        shown = list(shown) * len(asked)
    elif isinstance(questions, str):
        asked = asked * len(shown)
    if len(shown) != len(asked):
        raise ValueError(
            f"there are {len(shown)} pictures and {len(asked)} questions: give one for each, or one of either"
        )
    for place, (picture, question) in enumerate(zip(shown, asked, strict=True)):
        if not isinstance(question, str):
            raise TypeError(f"question {place} is of type {type(question).__name__}: give questions as str")
        seen = [] if picture is None else [opened(picture, place)]
        yield (Turn("user", question, len(seen)), Turn("assistant", UNREAD)), seen

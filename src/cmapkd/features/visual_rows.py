"""Visual tokens of two models that write, beside each other: the same places of the same pictures.

A dialogue shows one picture at most. So its visual tokens are those of one picture, row by row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatInput, ChatItem, Turn
from cmapkd.features.pyramid import resample
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import Rows


def check_visual_tokens(student: GenerativeModel, teacher: GenerativeModel) -> None:
    """Refuses two models whose visual tokens cannot be put beside each other, by how they read one picture.

    Raises:
        ConfigError: one has more tokens of a picture, and not both have a square grid of them.
    """
    own, theirs = (_tokens_of_a_picture(model) for model in (student, teacher))
    if own != theirs and not (own and theirs and _side(own) and _side(theirs)):
        raise ConfigError(
            f"{student.name} reads {own} visual tokens of a square picture, and its teacher {teacher.name} {theirs}: "
            "such tokens are compared one by one, or by square grids of them. Give both one size of pictures and of "
            "patches, or take method token_kd, which compares answers alone"
        )


def check_same_texts(student: GenerativeModel, teacher: GenerativeModel, *, whole: bool, instead: str) -> None:
    """Refuses two models whose prompts have other numbers of words, by how they read one dialogue with a picture.

    Args:
        whole: whether words in front of the picture count, too.
        instead: what to do, for the message.
    Raises:
        ConfigError: with both numbers.
    """
    own, theirs = (_words_of_a_dialogue(model, whole=whole) for model in (student, teacher))
    if own != theirs:
        raise ConfigError(
            f"of one dialogue {student.name} reads {own} tokens {'beside' if whole else 'behind'} its picture, and its "
            f"teacher {teacher.name} {theirs}: their chat templates differ, and tokens are compared one by one. "
            f"{instead}"
        )


def per_picture(inputs: ChatInput) -> list[int]:
    """How many visual tokens each dialogue has. Inputs that lie on the host make nothing wait for a device."""
    counts: list[int] = inputs.visual.sum(-1).tolist()
    return counts


def beside(teacher: Rows, counts: Sequence[int], theirs: Sequence[int]) -> Float[Tensor, "rows width"]:
    """The teacher's rows, as many of each picture as the student has, in the student's order.

    A picture of which both have as many tokens is left as it is. Else both have square grids, and the teacher's cells
    are averaged, or interpolated where the student has more (`features.pyramid.resample`).

    Args:
        counts, theirs: rows of each dialogue, of student and teacher.
    Raises:
        ValueError: the numbers of tokens differ, and are not both squares.
    """
    if list(counts) == list(theirs):
        return teacher.values
    made = []
    for values, own, other in zip(teacher.values.split(list(theirs)), counts, theirs, strict=True):
        if own != other:
            sides = _side(own), _side(other)
            if not (own and other and sides[0] and sides[1]):
                raise ValueError(
                    f"of one picture the student has {own} visual tokens and the teacher {other}, which are not both "
                    "square grids: give both models one size of pictures and of patches"
                )
            values = resample(values[None], (sides[1], sides[1]), (sides[0], sides[0]))[0]
        made.append(values)
    return torch.cat(made)


def by_pictures(
    student: Float[Tensor, "rows width"], teacher: Float[Tensor, "rows teacher_width"], counts: Sequence[int]
) -> list[tuple[Float[Tensor, "pictures tokens width"], Float[Tensor, "pictures tokens teacher_width"]]]:
    """Rows of both models as tables, one for all pictures with the same number of tokens; none of dialogues without."""
    groups: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for pair in zip(student.split(list(counts)), teacher.split(list(counts)), strict=True):
        groups[len(pair[0])].append(pair)
    return [
        (torch.stack([own for own, _ in pairs]), torch.stack([theirs for _, theirs in pairs]))
        for number, pairs in groups.items()
        if number
    ]


def _side(number: int) -> int:
    """Of a square grid with so many cells; 0 where there is none."""
    side = math.isqrt(number)
    return side if side * side == number else 0


def _tokens_of_a_picture(model: GenerativeModel) -> int:
    return int(_example(model).visual.sum())


def _words_of_a_dialogue(model: GenerativeModel, *, whole: bool) -> int:
    visual = _example(model).visual
    return int((~visual if whole else ~visual & (visual.cumsum(0) == visual.sum())).sum())


def _example(model: GenerativeModel) -> ChatItem:
    picture = Image.new("RGB", (64, 64), (90, 160, 40))
    return model.processor.read((Turn("user", "a", 1), Turn("assistant", "a")), [picture])

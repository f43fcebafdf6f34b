"""Task `agreement`: each model beside the first, its teacher: rankings, choices, and representations by level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cmapkd.evaluation.agreement import linear_cka, prediction_agreement, rank_agreement
from cmapkd.evaluation.embed import Embedded
from cmapkd.evaluation.subject import Bench, Subject
from cmapkd.evaluation.tasks.base import Column, Task

MAX_QUERIES = 1000
"""Queries of each direction whose whole rankings are compared: evenly spread over the source."""


class Agreement(Task):
    title = "Agreement with the first model"
    needs_levels = needs_reference = True
    columns = (
        Column("rank corr. i2t", ("i2t", "rank_correlation"), 3),
        Column("rank corr. t2i", ("t2i", "rank_correlation"), 3),
        Column("top-1 i2t %", ("i2t", "top1")),
        Column("top-1 t2i %", ("t2i", "top1")),
        Column("zero-shot top-1 %", ("zero_shot", "top1")),
        Column("CKA image", ("cka", "P5"), 3),
        Column("CKA text", ("cka", "L4"), 3),
    )

    def measure(self, subjects: Sequence[Subject], bench: Bench) -> list[dict[str, Any]]:  # noqa: ARG002
        """The first model's own row is what perfect agreement looks like."""
        return [_compare(subject, subjects[0]) for subject in subjects]


def _compare(subject: Subject, teacher: Subject) -> dict[str, Any]:
    mine, theirs = subject.embedded, teacher.embedded
    if mine.ids != theirs.ids or mine.captions != theirs.captions:
        raise ValueError(
            f"{subject.name} and {teacher.name} could read different samples of the source, so their answers cannot be "
            f"compared one by one: {len(mine.ids)} and {len(theirs.ids)} images. Remove the unreadable ones."
        )
    result: dict[str, Any] = {"teacher": teacher.name, "num_images": len(mine.ids)}
    if mine.captions:
        texts = _first_of_each(mine.captions)
        images = _spread(len(mine.ids))
        queries = texts[_spread(len(texts))]
        result["i2t"] = rank_agreement(
            mine.images[images], mine.texts[texts], theirs.images[images], theirs.texts[texts]
        )
        result["t2i"] = rank_agreement(mine.texts[queries], mine.images, theirs.texts[queries], theirs.images)
        result["num_texts"] = len(texts)
    if bool((mine.labels >= 0).any()) and subject.class_names is not None:
        result["zero_shot"] = prediction_agreement(
            mine.images, subject.class_weights, theirs.images, teacher.class_weights, mine.labels
        )
    result["cka"] = _cka(mine, theirs)
    return {name: _known(value) for name, value in result.items()}


def _known(value: Any) -> Any:
    """JSON has no NaN: what could not be computed (a constant representation, no errors to share) is None."""
    if isinstance(value, dict):
        return {name: _known(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _cka(mine: Embedded, theirs: Embedded) -> dict[str, float]:
    """By level, P2 to P5 and L1 to L4; P5 and L4 are the embeddings, which are unit vectors here."""
    texts = _first_of_each(mine.captions) if mine.captions else None
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, values in mine.image_levels.items():
        pairs[name] = values, theirs.image_levels[name]
    pairs["P5"] = mine.images, theirs.images
    if texts is not None and len(texts) > 1:
        for name, values in mine.text_levels.items():
            pairs[name] = values[texts], theirs.text_levels[name][texts]
        pairs["L4"] = mine.texts[texts], theirs.texts[texts]
    return {name: linear_cka(*pair) for name, pair in pairs.items() if len(pair[0]) > 1}


def _first_of_each(captions: Sequence[str]) -> Int[Tensor, " texts"]:
    """Where each different caption stands first: equal ones would count as candidates twice."""
    return torch.tensor(
        list({caption: place for place, caption in reversed(list(enumerate(captions)))}.values())
    ).sort()[0]


def _spread(length: int) -> Int[Tensor, " queries"]:
    count = min(length, MAX_QUERIES)
    return (torch.arange(count) * length) // count

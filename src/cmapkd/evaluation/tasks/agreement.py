"""Task `agreement`: each model against the first, its teacher: rankings, choices, and representations by level."""

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
    student, reference = subject.embedded, teacher.embedded
    if student.ids != reference.ids or student.captions != reference.captions:
        raise ValueError(
            f"{subject.name} and {teacher.name} could read different samples of the source, so their answers cannot be "
            f"compared one by one: {len(student.ids)} and {len(reference.ids)} images. Remove the unreadable ones."
        )
    result: dict[str, Any] = {"teacher": teacher.name, "num_images": len(student.ids)}
    if student.captions:
        texts = _first_of_each(student.captions)
        images = _spread(len(student.ids))
        queries = texts[_spread(len(texts))]
        result["i2t"] = rank_agreement(
            student.images[images], student.texts[texts], reference.images[images], reference.texts[texts]
        )
        result["t2i"] = rank_agreement(
            student.texts[queries], student.images, reference.texts[queries], reference.images
        )
        result["num_texts"] = len(texts)
    if bool((student.labels >= 0).any()) and subject.class_names is not None:
        result["zero_shot"] = prediction_agreement(
            student.images, subject.class_weights, reference.images, teacher.class_weights, student.labels
        )
    result["cka"] = _cka(student, reference)
    return {name: _known(value) for name, value in result.items()}


def _known(value: Any) -> Any:
    """JSON has no NaN: what could not be computed (a constant representation, no errors to share) is None."""
    if isinstance(value, dict):
        return {name: _known(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _cka(student: Embedded, reference: Embedded) -> dict[str, float]:
    """By level, P2 to P5 and L1 to L4; P5 and L4 are the embeddings, which are unit vectors here."""
    texts = _first_of_each(student.captions) if student.captions else None
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, values in student.image_levels.items():
        if name in reference.image_levels:  # exported files have no levels
            pairs[name] = values, reference.image_levels[name]
    pairs["P5"] = student.images, reference.images
    if texts is not None and len(texts) > 1:
        for name, values in student.text_levels.items():
            if name in reference.text_levels:
                pairs[name] = values[texts], reference.text_levels[name][texts]
        pairs["L4"] = student.texts[texts], reference.texts[texts]
    return {name: linear_cka(*pair) for name, pair in pairs.items() if len(pair[0]) > 1}


def _first_of_each(captions: Sequence[str]) -> Int[Tensor, " texts"]:
    """Where each different caption stands first: equal ones would count as candidates twice."""
    return torch.tensor(
        list({caption: place for place, caption in reversed(list(enumerate(captions)))}.values())
    ).sort()[0]


def _spread(length: int) -> Int[Tensor, " queries"]:
    count = min(length, MAX_QUERIES)
    return (torch.arange(count) * length) // count

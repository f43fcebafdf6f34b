"""The numbers that stand for an evaluation: of each task one, by which steps are chosen and gaps are closed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmapkd.config import counted
from cmapkd.evaluation.tasks import TASKS, Headline


def headlines(scores: Mapping[str, Any] | None) -> dict[str, tuple[Headline, float]]:
    """By task, in the order of `TASKS`, of the tasks that have a headline and were measured."""
    by_task: dict[str, tuple[Headline, float]] = {}
    for name in TASKS if scores else ():
        headline = TASKS[name].headline if scores and scores.get(name) else None
        number = None if headline is None else number_at(scores, (name, *headline.path))
        if headline is not None and number is not None:
            by_task[name] = (headline, number)
    return by_task


def number_at(scores: Any, path: tuple[str, ...]) -> float | None:
    """The number at a path of nested scores; None where there is none."""
    for key in path:
        scores = scores.get(key) if isinstance(scores, Mapping) else None
    return float(scores) if isinstance(scores, int | float) and not isinstance(scores, bool) else None


def retrieval_set(scores: Mapping[str, Any] | None) -> str | None:
    """What a retrieval score is of, as `1,000 images, 5,000 captions`; None where there is none.

    Args:
        scores: of one model, or its `retrieval` alone.
    """
    of = scores.get("retrieval", scores) if isinstance(scores, Mapping) else {}
    images, texts = number_at(of, ("num_images",)), number_at(of, ("num_texts",))
    if images is None or texts is None:
        return None
    return f"{counted(int(images), 'image')}, {counted(int(texts), 'caption')}"


def scored_set(scores: Mapping[str, Any] | None) -> str | None:
    """What all scores of a model are of, in a sentence; None where no source was embedded, or it does not say.

    Args:
        scores: of `evaluate_models`, of one model.
    """
    of = scores.get("scored") if isinstance(scores, Mapping) else None
    if not isinstance(of, Mapping):
        return None
    images, captions, skipped, samples = (of.get(key) for key in ("images", "captions", "skipped", "samples"))
    if not (isinstance(images, int) and isinstance(captions, int)):
        return None
    if not (isinstance(skipped, int) and isinstance(samples, int)):
        return None
    limit = of.get("limit")
    parts = [counted(images, "image")]
    if isinstance(questions := of.get("questions"), int):  # of a model that writes, which reads either
        parts += [counted(number, name) for number, name in ((questions, "question"), (captions, "caption")) if number]
    elif captions or not isinstance(scores.get("accuracy") if isinstance(scores, Mapping) else None, Mapping):
        parts.append(counted(captions, "caption"))  # a classifier reads none
    line = "scored on " + " and ".join(parts)
    if isinstance(limit, int) and limit < samples:
        line += f", the first {limit:,} of {samples:,} samples (evaluation.limit)"
    if skipped:
        line += f"; {skipped:,} of {images + skipped:,} samples could not be read and are left out"
    return line


def remark_on_retrieval(scores: Mapping[str, Any] | None) -> str | None:
    """What `retrieval` found unusual about its set; None where nothing is."""
    of = scores.get("retrieval") if isinstance(scores, Mapping) else None
    remark = of.get("remark") if isinstance(of, Mapping) else None
    return remark if isinstance(remark, str) else None

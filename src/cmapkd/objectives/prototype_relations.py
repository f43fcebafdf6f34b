"""Prototypes of classes: how the mean pictures follow batches, match texts, and how everything relates to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmapkd.objectives.classes import labelled_cross_entropy
from cmapkd.objectives.common import EXCLUDED, at_least_float32, similarities
from cmapkd.objectives.divergence import check_temperature, row_divergences


def moved_prototypes(
    prototypes: Float[Tensor, "classes dim"],
    images: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    *,
    momentum: float,
) -> Float[Tensor, "classes dim"]:
    """N(momentum P_c + (1 - momentum) M_c), where M_c is the mean unit image of class c in the batch.

    Args:
        prototypes: unit vectors, which get no gradient; those of classes that the batch does not have stay.
        images: embeddings, normalised here; the gradient reaches them.
        labels: negative where there is none.
        momentum: weight of the past, in [0, 1].
    Returns:
        Unit vectors, float32 or wider.
    Raises:
        ValueError: the shapes do not fit, or the momentum is not in [0, 1].
    """
    if images.shape != (len(labels), prototypes.shape[1]) or not 0 <= momentum <= 1:
        raise ValueError(
            f"images has shape {tuple(images.shape)}, labels {tuple(labels.shape)} and prototypes "
            f"{tuple(prototypes.shape)}, with momentum {momentum:g}: expected [batch, dim], [batch] and "
            "[classes, dim], with a momentum from 0 to 1"
        )
    kept = at_least_float32(prototypes.detach())
    with torch.autocast(images.device.type, enabled=False):
        units = F.normalize(at_least_float32(images), dim=-1)
        of_class = (labels == torch.arange(len(kept), device=labels.device)[:, None]).to(units.dtype)
        count = of_class.sum(1, keepdim=True)
        means = of_class @ units / count.clamp_min(1)
    moved = F.normalize(momentum * kept + (1 - momentum) * means, dim=-1)
    return torch.where(count > 0, moved, kept)


def prototype_alignment(logits: Float[Tensor, "classes classes"], shown: Bool[Tensor, " classes"]) -> Float[Tensor, ""]:
    """Mean of both directions' cross-entropy of each class's picture prototype with its own text.

    Args:
        logits: scores of picture prototypes (rows) and texts (columns).
        shown: classes that have a picture prototype. The others are neither rows nor candidates.
    Returns:
        In nats, >= 0.
    """
    classes = torch.arange(len(shown), device=shown.device)
    own = torch.where(shown, classes, -1)
    wide = at_least_float32(logits)
    to_texts, to_pictures = (scores.masked_fill(~shown, EXCLUDED) for scores in (wide, wide.T))
    return (labelled_cross_entropy(to_texts, own) + labelled_cross_entropy(to_pictures, own)) / 2


def relations_of(
    images: Float[Tensor, "batch dim"],
    pictures: Float[Tensor, "classes dim"],
    texts: Float[Tensor, "classes dim"],
    scale: Float[Tensor, ""],
) -> tuple[Float[Tensor, "rows classes"], ...]:
    """Scaled cosines of images with a model's prototypes and texts, and of its texts with both: four tables.

    Args:
        pictures, texts: the model's prototype and text of each class.
        scale: the model's logit scale.
    Returns:
        Images to pictures, images to texts [batch classes]; texts to texts, texts to pictures [classes classes].
    """
    pairs = ((images, pictures), (images, texts), (texts, texts), (texts, pictures))
    return tuple(similarities(*pair, scale) for pair in pairs)


def relation_divergences(
    student_logits: Float[Tensor, "rows classes"],
    teacher_logits: Float[Tensor, "rows classes"],
    shown: Bool[Tensor, " classes"] | None = None,
    *,
    temperature: float,
) -> Float[Tensor, " rows"]:
    """KL(teacher || student) of each row's softmax over prototypes, times temperature squared.

    Args:
        student_logits, teacher_logits: of the same rows and classes, each to its own model's prototypes; the teacher's
            are detached.
        shown: classes that are candidates; None: all.
        temperature: divides both models' logits; > 0.
    Returns:
        In nats, >= 0, zero where both agree.
    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)}: "
            "both models must relate the same rows to the same classes"
        )
    check_temperature(temperature)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    if shown is not None:
        student, teacher = (logits.masked_fill(~shown, EXCLUDED) for logits in (student, teacher))
    return row_divergences(student, teacher, temperature=temperature)


def sample_divergences(
    student: Sequence[Float[Tensor, "rows classes"]],
    teacher: Sequence[Float[Tensor, "rows classes"]],
    of_class: Float[Tensor, "batch classes"],
    shown: Bool[Tensor, " classes"],
    *,
    temperature: float,
) -> Float[Tensor, " batch"]:
    """The sum of a sample's four divergences; those of texts are of its class's text.

    Args:
        student, teacher: each model's four tables, see `relations_of`.
        of_class: 1 at a sample's class; a row of zeros where it has no label.
        shown: classes that have a picture prototype.
    Returns:
        In nats, >= 0.
    """
    by_picture, by_text, texts, crossed = (
        relation_divergences(own, theirs, candidates, temperature=temperature)
        for own, theirs, candidates in zip(student, teacher, (shown, None, None, shown), strict=True)
    )
    return by_picture + by_text + of_class @ (texts + crossed)

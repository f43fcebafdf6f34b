"""Distance between a student's embedding and its teacher's."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.common import at_least_float32, check_same_width, unit


def embedding_distance(
    student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"]
) -> Float[Tensor, " batch"]:
    """Squared distance between the unit embeddings of each sample, |N(s) - N(t)|^2 = 2 - 2 cos(s, t).

    A sum over channels, not a mean: its size, and so the meaning of a weight on it, does not depend on the width.

    Args:
        student: already at the teacher's width; normalised here.
        teacher: normalised and detached here.
    Returns:
        For each sample in [0, 4], no unit; zero when the directions agree.
    Raises:
        ValueError: the shapes differ.
    Source: feature distillation of CLIP-KD, Yang et al. 2024, arXiv:2307.12732, which states it as a mean over
        channels: its weight w there is w / dim here.
    """
    check_same_width(student, teacher, "embedding")
    return (unit(student) - unit(teacher.detach())).square().sum(-1)


def feature_distance(student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Mean over the batch of `embedding_distance`.

    Args:
        student: already at the teacher's width; normalised here.
        teacher: normalised and detached here.
    Returns:
        In [0, 4], no unit; zero when the directions agree.
    Raises:
        ValueError: the shapes differ.
    """
    return embedding_distance(student, teacher).mean()


def labelled_distance(
    student: Float[Tensor, "batch dim"],
    teacher: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean of `embedding_distance` over the samples that have a label; half of it is 1 - cos.

    Args:
        student: already at the teacher's width; normalised here.
        teacher: normalised and detached here.
        labels: negative where a sample does not count; None: all count.
    Returns:
        In [0, 4], no unit; zero, with a gradient of zero, where no sample counts.
    Raises:
        ValueError: the shapes differ.
    """
    distances = embedding_distance(student, teacher)
    if labels is None:
        return distances.mean()
    known = labels >= 0
    return (distances * known).sum() / known.sum().clamp_min(1)


def log_distance(student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """log(1 + d / 10), d the batch mean of the squared distance of embeddings as they are.

    Args:
        student: already at the teacher's width; not normalised.
        teacher: detached here.
    Returns:
        >= 0, no unit; zero where they are equal.
    Raises:
        ValueError: the shapes differ.
    Source: Li et al. 2023, arXiv:2307.03135, the alternative feature term of its code.
    """
    check_same_width(student, teacher, "embedding")
    return ((at_least_float32(student) - at_least_float32(teacher.detach())).square().sum(-1).mean() / 10).log1p()


def absolute_distance(first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Mean absolute difference of unit vectors, over samples and channels.

    Args:
        first, second: normalised here; neither is detached, since both may be learned.
    Returns:
        In [0, 2 / √dim], no unit; zero when the directions agree. Between random directions it shrinks as 1 / √dim.
    Raises:
        ValueError: the shapes differ.
    Source: the image term of VL2Lite, Jang et al., CVPR 2025.
    """
    check_same_width(first, second, "vector")
    return (unit(first) - unit(second)).abs().mean()

"""Agreement of two models about how samples, or the levels of one sample, relate to each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import at_least_float32, check_pairs, similarities


def relation_distance(
    student: Float[Tensor, "batch student_dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    *,
    chunk: int | None = None,
) -> Float[Tensor, " batch"]:
    """Mean squared difference of a sample's cosines with the batch, student against teacher.

    The batch mean is |G_T - G_S|_F^2 / batch^2, with G the Gram matrix of the unit rows. Only cosines are compared, so
    the widths may differ. A sample's cosine with itself is 1 in both and counts as a difference of zero.

    Args:
        student, teacher: vectors of one modality and level, row i of both from sample i; normalised here. The
            teacher's are detached.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        For each sample in [0, 4], no unit; all zero when the cosines agree.
    Raises:
        ValueError: the shapes do not pair up, or the chunk is not positive.
    Source: the relation term of the CMAPKD design, section 5.
    """
    check_pairs(student=student, teacher=teacher)
    teacher = teacher.detach()

    def distances(
        student_rows: Float[Tensor, "rows dim"], teacher_rows: Float[Tensor, "rows teacher_dim"]
    ) -> Float[Tensor, " rows"]:
        return (similarities(student_rows, student, 1.0) - similarities(teacher_rows, teacher, 1.0)).square().mean(-1)

    return by_rows(distances, student, teacher, size=chunk_rows(len(student), len(student), chunk))


def layer_relation_distance(
    student: Float[Tensor, "batch levels student_dim"], teacher: Float[Tensor, "batch levels teacher_dim"]
) -> Float[Tensor, " batch"]:
    """Mean squared difference of the cosines between the levels of one sample, student against teacher.

    Args:
        student, teacher: a vector for each level, the levels of each model in one common space of its own and in the
            same order; normalised here. The teacher's are detached.
    Returns:
        For each sample |R_T - R_S|_F^2 / levels^2, in [0, 4], no unit, with R its levels x levels matrix of cosines;
        zero when the cosines agree.
    Raises:
        ValueError: the samples or the levels do not pair up.
    Source: the layer relation term of the CMAPKD design, section 5.
    """
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student has shape {tuple(student.shape)} but teacher {tuple(teacher.shape)}: give both as "
            "[batch, levels, dim] with the same samples and levels (the widths may differ)"
        )
    return (_level_cosines(student) - _level_cosines(teacher.detach())).square().mean((-2, -1))


def token_relation_distance(
    student: Float[Tensor, "pictures tokens student_dim"], teacher: Float[Tensor, "pictures tokens teacher_dim"]
) -> Float[Tensor, " pictures"]:
    """How far the cosines among the tokens of one picture point in another direction, student against teacher.

    R is the tokens x tokens matrix of cosines of a picture, read as one long vector. Where a student's cosines are all
    the same multiple of the teacher's, the distance is zero.

    Args:
        student, teacher: the same tokens of the same pictures, of any width; normalised here. The teacher's are
            detached.
    Returns:
        For each picture 1 - cos(R_S, R_T), in [0, 2], no unit; zero when the cosines agree. float32 or wider.
    Raises:
        ValueError: the pictures or the tokens do not pair up.
    Source: LLaVA-KD, arXiv:2410.16236, relation distillation.
    """
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student has shape {tuple(student.shape)} but teacher {tuple(teacher.shape)}: give both as "
            "[pictures, tokens, dim] with the same pictures and tokens (the widths may differ)"
        )
    own, theirs = _level_cosines(student).flatten(1), _level_cosines(teacher.detach()).flatten(1)
    return 1 - F.cosine_similarity(own, theirs, dim=-1)


def _level_cosines(levels: Float[Tensor, "batch levels dim"]) -> Float[Tensor, "batch levels levels"]:
    directions = F.normalize(at_least_float32(levels), dim=-1)
    with torch.autocast(levels.device.type, enabled=False):
        return directions @ directions.mT

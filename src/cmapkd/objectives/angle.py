"""Angles between embeddings, and how far a teacher's answers spread around their mean direction."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import check_same_width, unit

_NEAR = 1e-3  # squared chord below which the series is exact to float64
_OPPOSITE = 1e-12  # squared chord to the opposite point: below, the direction of the gradient is not defined


def squared_angle(student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
    """Θ² with Θ = arccos cos(student, teacher), in radians squared.

    Computed from the chords u = |s - t|² and w = |s + t|² of the unit vectors: Θ = 2 atan2(√u, √w), and by its series
    u + u²/12 + u³/90 + u⁴/560 where the vectors nearly agree. In float32 arccos has neither value nor gradient at
    angles below 3e-4, and is off by percents around 1e-3.

    Args:
        student: already at the teacher's width; normalised here.
        teacher: normalised and detached here.
    Returns:
        For each sample in [0, π²]; zero, with a gradient of zero, when the directions agree.
    Raises:
        ValueError: the shapes differ.
    Source: the summary loss of C-RADIOv4, arXiv:2601.17237, before it is divided by the teacher's dispersion.
    """
    check_same_width(student, teacher, "embedding")
    ours, theirs = unit(student), unit(teacher.detach())
    apart, beyond = (ours - theirs).square().sum(-1), (ours + theirs).square().sum(-1)
    near = apart < _NEAR
    far = torch.where(near, 1.0, apart)  # a root of zero has no gradient
    angle = 2 * torch.atan2(far.sqrt(), beyond.clamp_min(_OPPOSITE).sqrt())
    series = apart * (1 + apart * (1 / 12 + apart * (1 / 90 + apart / 560)))
    return torch.where(near, series, angle.square())


def angular_dispersion(embeddings: Float[Tensor, "samples dim"]) -> Float[Tensor, ""]:
    """E[Θ(y, μ)²] around the mean direction μ = E[y] / |E[y]| of unit vectors y; radians squared, in [0, π²].

    Args:
        embeddings: a teacher's answers; normalised here.
    Source: C-RADIOv4, arXiv:2601.17237.
    """
    rows = unit(embeddings)
    return squared_angle(rows, rows.mean(0).expand_as(rows)).mean()

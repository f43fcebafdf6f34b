"""Agreement of two models about which texts belong to which images, at every coupled pair of their levels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import at_least_float32
from cmapkd.objectives.divergence import row_divergences

Pairs = tuple[Tensor, ...]  # the visual and the language index of each coupled pair, both Int[pairs]


def prior_coupling() -> Float[Tensor, "4 4"]:
    """Coupling of P2, P3, P4, P5 (rows) with L1, L2, L3, L4 (columns) by how fine their meaning is.

    Tokens go with local detail (P2, P3), phrases with regions (P3, P4), the sentence with global meaning (P4, P5), the
    global text with P5; the other nine pairs are zero. Every row sums to one and the whole to four, the number of
    visual levels, as do uniform level weights: each visual level counts once, shared equally by its partners.

    Source: the CMAPKD design, section 5.
    """
    partners = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.float32)
    return partners / partners.sum(1, keepdim=True)


def pyramid_divergence(
    student_visual: Float[Tensor, "visual_levels batch student_dim"],
    student_language: Float[Tensor, "language_levels batch student_dim"],
    teacher_visual: Float[Tensor, "visual_levels batch teacher_dim"],
    teacher_language: Float[Tensor, "language_levels batch teacher_dim"],
    *,
    coupling: Float[Tensor, "visual_levels language_levels"],
    student_scale: Float[Tensor, "visual_levels language_levels"] | Float[Tensor, ""] | float,
    teacher_scale: Float[Tensor, "visual_levels language_levels"] | Float[Tensor, ""] | float,
    chunk: int | None = None,
) -> Float[Tensor, "batch visual_levels language_levels"]:
    """Coupling x KL(teacher || student) of the in-batch softmax, for every sample and pair of levels.

    Summed over pairs and averaged over the batch it is the pyramid alignment loss; for one pair coupled at 1 that is
    `similarity_divergence`. With zeros and ones as coupling the values are unweighted, for a weighting to multiply.

    Args:
        student_visual, student_language, teacher_visual, teacher_language: a vector for each level and sample, row i
            of each from pair i, in one space for each model; normalised here. The teacher's are detached. A pair of
            levels with a space of its own, as the two towers' joint space, takes a call of its own.
        coupling: >= 0. A pair at zero is not computed, so a learned coupling cannot leave zero. On the CPU it costs no
            synchronisation with the device.
        student_scale, teacher_scale: logit scales (already exponentiated), one for all pairs or one for each.
        chunk: samples at a time, see `chunk_rows`; values and gradients do not depend on it.
    Returns:
        Mean of both directions (the sample's image over the texts, its text over the images) in nats x coupling, >= 0;
        zero when the distributions agree and at pairs that are not coupled; float32 or wider.
    Raises:
        ValueError: levels, samples or widths do not pair up, a coupling or scale is not of the levels' shape, or the
            chunk is not positive.
    Source: the pyramid alignment term of the CMAPKD design, section 5.
    """
    _check(student_visual, student_language, teacher_visual, teacher_language)
    _check_of_pairs(student_visual, student_language, coupling, student_scale, teacher_scale)
    device = student_visual.device
    visual, language = coupling.nonzero(as_tuple=True)
    counts = coupling[visual, language].to(device, non_blocking=True)
    pairs = visual.to(device, non_blocking=True), language.to(device, non_blocking=True)
    num_samples = student_visual.shape[1]
    size = chunk_rows(num_samples, num_samples * max(1, len(pairs[0])), chunk)
    student = _pair_vectors(student_visual, student_language, pairs)
    teacher = _pair_vectors(teacher_visual.detach(), teacher_language.detach(), pairs)
    scales = _pair_scale(student_scale, pairs), _pair_scale(teacher_scale, pairs)
    if size >= num_samples:
        logits = _pair_logits(*student, scales[0]), _pair_logits(*teacher, scales[1]).detach()
        both = row_divergences(*logits), row_divergences(logits[0].mT, logits[1].mT)
    else:
        both = (
            _divergences(student, teacher, scales, size=size),
            _divergences(student[::-1], teacher[::-1], scales, size=size),
        )
    divergences = (both[0] + both[1]) / 2
    weighted = counts.to(divergences)[:, None] * divergences
    return weighted.new_zeros(*coupling.shape, weighted.shape[1]).index_put(pairs, weighted).permute(2, 0, 1)


def _pair_vectors(
    visual: Float[Tensor, "visual_levels batch dim"], language: Float[Tensor, "language_levels batch dim"], pairs: Pairs
) -> tuple[Float[Tensor, "pairs batch dim"], Float[Tensor, "pairs batch dim"]]:
    rows = F.normalize(at_least_float32(visual), dim=-1)[pairs[0]]
    return rows, F.normalize(at_least_float32(language), dim=-1)[pairs[1]]


def _pair_scale(scale: Tensor | float, pairs: Pairs) -> Tensor | float:
    return scale[pairs][:, None, None] if isinstance(scale, Tensor) and scale.ndim else scale


def _pair_logits(
    rows: Float[Tensor, "pairs some dim"], columns: Float[Tensor, "pairs batch dim"], scale: Tensor | float
) -> Float[Tensor, "pairs some batch"]:
    """`similarities` of every coupled pair in one product; outside autocast for the same reason."""
    scale = scale.to(rows) if isinstance(scale, Tensor) and scale.ndim else scale
    with torch.autocast(rows.device.type, enabled=False):
        return scale * rows @ columns.mT


def _divergences(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    scales: tuple[Tensor | float, Tensor | float],
    *,
    size: int,
) -> Float[Tensor, "pairs batch"]:
    """KL over the second of each model's vectors, for each of the first; `size` samples at a time."""

    def of_rows(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
        with torch.no_grad():
            targets = _pair_logits(teacher_rows, teacher[1], scales[1])
        return row_divergences(_pair_logits(student_rows, student[1], scales[0]), targets)

    return by_rows(of_rows, student[0], teacher[0], size=size, dim=1)


def _check(student_visual: Tensor, student_language: Tensor, teacher_visual: Tensor, teacher_language: Tensor) -> None:
    vectors = {
        "student_visual": student_visual,
        "student_language": student_language,
        "teacher_visual": teacher_visual,
        "teacher_language": teacher_language,
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in vectors.items()}
    if (
        any(len(shape) != 3 for shape in shapes.values())
        or len({shape[1] for shape in shapes.values()}) != 1
        or student_visual.shape[0] != teacher_visual.shape[0]
        or student_language.shape[0] != teacher_language.shape[0]
    ):
        raise ValueError(
            f"expected [levels, batch, dim] tensors, got {shapes}: student and teacher need the same levels of each "
            "modality, and row i of every level must belong to pair i"
        )
    if student_visual.shape[2] != student_language.shape[2] or teacher_visual.shape[2] != teacher_language.shape[2]:
        raise ValueError(
            f"the visual and language vectors of one model differ in width, got {shapes}: a cosine needs one space, so "
            "map both through the model's alignment bridge first"
        )


def _check_of_pairs(visual: Tensor, language: Tensor, coupling: Tensor, *scales: Tensor | float) -> None:
    levels = (visual.shape[0], language.shape[0])
    if tuple(coupling.shape) != levels:
        raise ValueError(
            f"coupling has shape {tuple(coupling.shape)} but there are {levels[0]} visual and {levels[1]} language "
            f"levels: give one number for each pair, shape {levels}"
        )
    for scale in scales:
        if isinstance(scale, Tensor) and scale.ndim and tuple(scale.shape) != levels:
            raise ValueError(
                f"a scale has shape {tuple(scale.shape)} but there are {levels[0]} visual and {levels[1]} language "
                f"levels: give one number for all pairs, or one for each, shape {levels}"
            )

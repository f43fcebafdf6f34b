"""Between models: softmaxes over one model's rows among the other's, of which each follows another."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import check_two_models, similarities
from cmapkd.objectives.divergence import row_divergences


def vertical_divergence(
    student_image: Float[Tensor, "batch dim"],
    student_text: Float[Tensor, "batch dim"],
    teacher_image: Float[Tensor, "batch dim"],
    teacher_text: Float[Tensor, "batch dim"],
    *,
    image_scale: Float[Tensor, ""] | float,
    text_scale: Float[Tensor, ""] | float,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """KL(texts || images) of the softmaxes between the two models, within each modality.

    As the teacher's texts find the student's texts, its images should find the student's images; and likewise with the
    models exchanged: 1/2 [KL(T_t S_t^T || T_i S_i^T) + KL(S_t T_t^T || S_i T_i^T)] of the scaled cosines' softmaxes.
    Only images learn: the texts' softmaxes are the target, so nothing of them gets a gradient, `text_scale` included.

    Args:
        student_image, student_text: at the teacher's width, row i of each from pair i; normalised here.
        teacher_image, teacher_text: normalised and detached here.
        image_scale, text_scale: multiply the cosines within each modality; > 0.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Mean of both directions, in nats, >= 0; zero when the distributions agree. A student that equals its teacher
        need not reach zero: there the teacher's images must relate to each other as its texts do.
    Raises:
        ValueError: the shapes do not pair up, the widths differ, or the chunk is not positive.
    Source: `VRD_loss` in the published code of CLIP-RD, Chung et al. 2026, arXiv:2603.25383.
    """
    check_two_models(student_image, student_text, teacher_image, teacher_text)
    teacher_image, teacher_text = teacher_image.detach(), teacher_text.detach()
    size = chunk_rows(len(student_image), len(teacher_image), chunk)

    def among(images: Tensor, texts: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def of_rows(image_rows: Tensor, text_rows: Tensor) -> Tensor:
            target = similarities(text_rows, texts, text_scale).detach()
            return row_divergences(similarities(image_rows, images, image_scale), target)

        return of_rows

    of_teacher = by_rows(among(student_image, student_text), teacher_image, teacher_text, size=size)
    of_student = by_rows(among(teacher_image, teacher_text), student_image, student_text, size=size)
    return (of_teacher + of_student).mean() / 2


def crosswise_divergence(
    student_image: Float[Tensor, "batch dim"],
    student_text: Float[Tensor, "batch dim"],
    teacher_image: Float[Tensor, "batch dim"],
    teacher_text: Float[Tensor, "batch dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """KL in both directions between the two softmaxes that cross models and modalities.

    The teacher's images among the student's texts (a = T_i S_t^T) and the teacher's texts among the student's images
    (b = T_t S_i^T) should look alike, and so should the transposed ones: 1/4 [KL(b || a) + KL(a || b) + KL(b^T || a^T)
    + KL(a^T || b^T)] of the softmaxes over rows. The target of each KL is detached, its scale included.

    Args:
        student_image, student_text: at the teacher's width, row i of each from pair i; normalised here.
        teacher_image, teacher_text: normalised and detached here.
        logit_scale: multiplies all cosines; > 0.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Mean of the four, in nats, >= 0; zero when the distributions agree. A student that equals its teacher reaches
        zero only where the teacher's softmax over texts is that over images.
    Raises:
        ValueError: the shapes do not pair up, the widths differ, or the chunk is not positive.
    Source: `XRD_loss` in the published code of CLIP-RD, Chung et al. 2026, arXiv:2603.25383.
    """
    check_two_models(student_image, student_text, teacher_image, teacher_text)
    teacher_image, teacher_text = teacher_image.detach(), teacher_text.detach()
    size = chunk_rows(len(student_image), len(teacher_image), chunk)

    def among(images: Tensor, texts: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def of_rows(image_rows: Tensor, text_rows: Tensor) -> Tensor:
            of_images = similarities(image_rows, texts, logit_scale)
            of_texts = similarities(text_rows, images, logit_scale)
            return row_divergences(of_images, of_texts.detach()) + row_divergences(of_texts, of_images.detach())

        return of_rows

    of_teacher = by_rows(among(student_image, student_text), teacher_image, teacher_text, size=size)
    of_student = by_rows(among(teacher_image, teacher_text), student_image, student_text, size=size)
    return (of_teacher + of_student).mean() / 4

"""Classification losses over a fixed list of classes, where some samples have no label and some do not count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.common import at_least_float32


def labelled_cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], *, smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy with the right class, over the samples that have one.

    Args:
        logits: unnormalised scores of the classes.
        labels: the right class of each sample, or negative where it is not known.
        smoothing: probability that is spread over all classes, in [0, 1).
    Returns:
        Mean over the labelled samples in nats, >= 0; zero, with a gradient of zero, where there are none.
    Raises:
        ValueError: the shapes do not fit, or a label on the CPU has no class.
    """
    check_labels(logits, labels)
    known = labels >= 0
    losses = F.cross_entropy(at_least_float32(logits), labels.clamp_min(0), reduction="none", label_smoothing=smoothing)
    return (losses * known).sum() / known.sum().clamp_min(1)


def non_target_divergence(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    counts: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """KL(teacher || student) after both models' logit of the right class is put to zero.

    The right class stays a candidate, of score zero for both: what each thinks of it has no influence, and no gradient.

    Args:
        student_logits, teacher_logits: unnormalised scores of the same classes; the teacher's are detached.
        labels: the right class of each sample; negative where it is not known: then nothing is put to zero.
        counts: how much each sample counts, 0 for one that is left out; none: 1 for each.
    Returns:
        Sum over the samples that count, divided by the size of the whole batch; nats, >= 0.
    Raises:
        ValueError: the shapes do not fit, or a label on the CPU has no class.
    Source: Huo et al. 2024, C2KD, CVPR 2024 pp. 16006-16015 (its released code; there the logit is multiplied by zero).
    """
    check_labels(student_logits, labels)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} but teacher_logits {tuple(teacher_logits.shape)}: "
            "they are compared class by class"
        )
    target = torch.arange(student_logits.shape[1], device=labels.device) == labels[:, None]
    student_others, teacher_others = (
        at_least_float32(logits).masked_fill(target, 0.0) for logits in (student_logits, teacher_logits)
    )
    log_p_student, log_p_teacher = F.log_softmax(student_others, dim=1), F.log_softmax(teacher_others.detach(), dim=1)
    rows = F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(1)
    return (rows if counts is None else rows * counts).mean()


def check_labels(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> None:
    """Refuses labels that are not one for each row, and on the CPU those that have no class.

    To look at labels on a GPU would wait for everything that was launched there. Who brings labels to a GPU checks them
    before, with `check_classes`.

    Raises:
        ValueError: with the shapes, or the label.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and labels {tuple(labels.shape)}: expected [batch, classes] and "
            "one label for each row"
        )
    if labels.device.type == "cpu":
        check_classes(labels, logits.shape[1])


def check_classes(labels: Int[Tensor, " batch"], num_classes: int) -> None:
    """Refuses labels that have no class.

    Raises:
        ValueError: with the largest label.
    """
    if len(labels) and int(labels.max()) >= num_classes:
        raise ValueError(
            f"there is a label {int(labels.max())}, but only {num_classes} classes: give the class names that the "
            "labels were numbered by"
        )

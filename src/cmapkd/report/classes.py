"""Zero-shot classes of a run's models: which are taken for which, and whether their probabilities are right."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.evaluation.calibration import NUM_BINS, zero_shot_calibration
from cmapkd.evaluation.subject import Subject
from cmapkd.report.blocks import Block, Cell, Paragraph, Table
from cmapkd.report.figures import heat, reliability
from cmapkd.report.plain import shortened
from cmapkd.report.scores import COLOUR
from cmapkd.report.watch import Watched, class_names, named

MAX_HEAT = 30  # classes of a readable matrix
_PAIRS = 20


def confusions(watched: Watched) -> list[Block]:
    """What the student takes for what, beside the teacher; empty where pictures have no named labels."""
    names = class_names(watched)
    if names is None:
        return []
    labels, known = _labelled(watched)
    predicted = {
        name: (each.embedded.images[known] @ each.class_weights.T).argmax(1)
        for name, each in named(watched.subjects, "teacher", "student").items()
    }
    shown = [shortened(name, 60) for name in names]
    told = f"Of {len(labels):,} labelled pictures of {watched.source.name}, {len(names)} classes."
    if len(names) <= MAX_HEAT:
        counts = _matrix(labels, predicted["student"], len(names))
        return [Paragraph(told), heat("Student: truth and prediction", shown, counts)]
    return [Paragraph(told), _pairs(shown, labels, predicted)]


def _pairs(names: list[str], labels: Int[Tensor, " images"], predicted: dict[str, Int[Tensor, " images"]]) -> Table:
    """The pairs that the student confuses most often."""
    counts = {name: _wrong(labels, each, len(names)) for name, each in predicted.items()}
    order = sorted(counts["student"].items(), key=lambda pair: (-pair[1], pair[0]))[:_PAIRS]
    rows = []
    for (truth, taken), _ in order:
        of = int((labels == truth).sum())
        times = [each.get((truth, taken), 0) for each in counts.values()]
        rows.append([Cell(names[truth]), Cell(names[taken]), *(Cell(str(each), each) for each in (of, *times))])
    heads = ["truth", "taken for", "pictures of it", *(f"times, {name}" for name in counts)]
    return Table("The pairs that the student confuses most", heads, rows, words=2)


def _wrong(labels: Int[Tensor, " images"], predicted: Int[Tensor, " images"], size: int) -> dict[tuple[int, int], int]:
    """How often which class is taken for which other: as large as there are mistakes, however many classes."""
    pairs, counts = torch.unique((labels * size + predicted)[labels != predicted], return_counts=True)
    return {divmod(pair, size): count for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)}


def calibration(watched: Watched) -> list[Block]:
    """Reliability of the zero-shot probabilities of each model, with its own logit scale."""
    names = class_names(watched)
    if names is None:
        return []
    labels, known = _labelled(watched)
    rows, bins = [], {}
    for name, each in watched.subjects.items():
        scale = float(each.dual.log_logit_scale.detach().exp())
        images, weights = each.embedded.images[known], each.class_weights
        measured = zero_shot_calibration(images, labels, weights, logit_scale=scale)
        numbers = [measured[key] for key in ("ece", "confidence", "accuracy", "nll", "brier")]
        rows.append([Cell(name), *(Cell(f"{value:.2f}", value) for value in (*numbers, scale))])
        bins[name] = _bins(each, images, labels, scale)
    heads = ["model", "ECE, %", "confidence, %", "accuracy, %", "NLL, nats", "Brier", "logit scale"]
    text = (
        f"Probabilities over {len(names)} classes on {len(labels):,} pictures of {watched.source.name}. Below the "
        "diagonal a model is surer than it is right."
    )
    return [Paragraph(text), reliability("Accuracy by confidence", bins, COLOUR), Table("Calibration", heads, rows)]


def _bins(
    subject: Subject, images: Float[Tensor, "images dim"], labels: Int[Tensor, " images"], scale: float
) -> list[tuple[float, float, int]]:
    """Mean confidence and accuracy in percent, and pictures, of each bin of equal width that has pictures."""
    confidence, predicted = (scale * (images.double() @ subject.class_weights.double().T)).softmax(-1).max(-1)
    right = (predicted == labels).double()
    place = ((confidence * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)
    found = []
    for number in range(NUM_BINS):
        inside = place == number
        if count := int(inside.sum()):
            found.append((100 * float(confidence[inside].mean()), 100 * float(right[inside].mean()), count))
    return found


def _labelled(watched: Watched) -> tuple[Int[Tensor, " images"], Tensor]:
    labels = watched.seen.labels
    known = (labels >= 0).nonzero().flatten()
    return labels[known], known


def _matrix(truth: Int[Tensor, " images"], taken: Int[Tensor, " images"], size: int) -> list[list[int]]:
    counts: list[list[int]] = torch.bincount(truth * size + taken, minlength=size * size).view(size, size).tolist()
    return counts

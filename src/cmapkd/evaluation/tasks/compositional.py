"""Task `compositional`: whether a caption fits better than sentences that say one thing of the picture wrongly."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cmapkd.data.texts import NEGATIVES, false_texts
from cmapkd.evaluation.embed import FalseTexts
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Headline, Task


class Compositional(Task):
    """A sample counts where its first caption is above all its false texts; where it is as high as the best, half."""

    title = "Captions above false ones, percent"
    alone = True
    needs_negatives = True
    headline = Headline("compositional", ("above",), "compositional")
    columns = (
        Column("above all", ("above",)),
        Column("exchanged", ("by_kind", "exchanged", "above")),
        Column("relation", ("by_kind", "relation", "above")),
        Column("count", ("by_kind", "count", "above")),
        Column("replaced", ("by_kind", "replaced", "above")),
        Column("by chance", ("chance",)),
        Column("of samples", ("num_samples",), 0),
    )

    def missing(self, subject: Subject) -> str | None:
        samples = [sample for sample in subject.bench.first_samples if sample.captions]
        if any(false_texts(sample, sample.captions[0], 0) for sample in samples):
            return None
        return (
            f"none of its first samples has a caption and a text of the pool {NEGATIVES}: scenes make them, and files "
            f"bring them under that key (?texts={NEGATIVES})"
        )

    def score(self, subject: Subject) -> dict[str, Any]:
        embedded = subject.embedded
        found = embedded.negatives
        assert found is not None  # `needs_negatives`
        every = torch.ones(len(found.kinds), dtype=torch.bool)
        images = embedded.images[found.image_of_text]
        margins = (images * embedded.texts[found.caption_of_text]).sum(1) - (images * found.texts).sum(1)
        kinds = sorted({*found.kinds} - {""})
        return {
            **_above(margins, found, every),
            "by_kind": {
                kind: _above(margins, found, torch.tensor([each == kind for each in found.kinds])) for kind in kinds
            },
        }


def _above(margins: Float[Tensor, " false"], found: FalseTexts, chosen: Tensor) -> dict[str, Any]:
    """Over the samples that have any of the chosen false texts."""
    samples, place = found.image_of_text[chosen].unique(return_inverse=True)
    least = torch.full((len(samples),), torch.inf).scatter_reduce(0, place, margins[chosen], "amin")
    counts = torch.bincount(place, minlength=len(samples))
    above = (least > 0).double() + (least == 0).double() / 2
    return {
        "above": 100 * float(above.mean()),
        "chance": 100 * float((1 / (1 + counts.double())).mean()),
        "num_samples": len(samples),
        "num_false": int(counts.sum()),
    }

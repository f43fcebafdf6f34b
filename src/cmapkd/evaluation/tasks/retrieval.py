"""Task `retrieval`: image-text retrieval over all captions."""

from __future__ import annotations

from typing import Any

from cmapkd.evaluation.embed import Embedded
from cmapkd.evaluation.retrieval import rank_both_ways, retrieval_scores, shared_captions
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Headline, Task
from cmapkd.evaluation.usual_sets import remark_on


def modality_gap(embedded: Embedded) -> dict[str, float]:
    """Distance between the mean image and the mean caption: of unit vectors, and of embeddings as the towers give them.

    Source: Liang et al. 2022, arXiv:2203.02053, section 4.1 (of unit vectors).
    """
    gaps = {"unit": (embedded.images, embedded.texts)}
    if len(embedded.image_norms) and len(embedded.text_norms):
        raw = embedded.images * embedded.image_norms[:, None], embedded.texts * embedded.text_norms[:, None]
        gaps["raw"] = raw
    return {name: float((images.mean(0) - texts.mean(0)).norm()) for name, (images, texts) in gaps.items()}


class Retrieval(Task):
    title = "Retrieval, recall in percent"
    alone = automatic = True
    headline = Headline("mean_r@1", ("mean_r@1",), "R@1")
    columns = (
        Column("i2t R@1", ("i2t", "r@1")),
        Column("i2t R@5", ("i2t", "r@5")),
        Column("i2t R@10", ("i2t", "r@10")),
        Column("t2i R@1", ("t2i", "r@1")),
        Column("t2i R@5", ("t2i", "r@5")),
        Column("t2i R@10", ("t2i", "r@10")),
        Column("mean R@1", ("mean_r@1",)),
        Column("modality gap", ("modality_gap", "unit"), 3),
        Column("modality gap, raw", ("modality_gap", "raw"), 3),
        Column("of images", ("num_images",), 0),
        Column("of captions", ("num_texts",), 0),
    )

    def missing(self, subject: Subject) -> str | None:
        embedded = subject.embedded
        return None if embedded.captions else f"none of its {len(embedded.ids)} images has a caption"

    def score(self, subject: Subject) -> dict[str, Any]:
        embedded = subject.embedded
        shared = subject.bench.config.shared_captions
        extra = shared_captions(embedded.captions, embedded.image_of_text) if shared else None
        ranks = rank_both_ways(embedded.images, embedded.texts, embedded.image_of_text, also_positive=extra)
        subject.ranks |= ranks._asdict()
        scores = retrieval_scores(ranks, embedded.image_of_text, num_images=len(embedded.images))
        scores["modality_gap"] = modality_gap(embedded)
        remark = remark_on(subject.bench.scored.name, num_images=scores["num_images"], num_texts=scores["num_texts"])
        return scores | ({"remark": remark} if remark is not None else {})

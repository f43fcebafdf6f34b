"""Task `retrieval`: image-text retrieval over all captions."""

from __future__ import annotations

from typing import Any

from cmapkd.evaluation.retrieval import rank_both_ways, retrieval_scores, shared_captions
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Headline, Task
from cmapkd.evaluation.usual_sets import remark_on


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
        remark = remark_on(subject.bench.scored.name, num_images=scores["num_images"], num_texts=scores["num_texts"])
        return scores | ({"remark": remark} if remark is not None else {})

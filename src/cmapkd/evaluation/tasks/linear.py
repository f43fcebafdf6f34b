"""Tasks `linear_probe` and `knn`: how well labels can be read off the image embeddings of another split."""

from __future__ import annotations

from typing import Any

from cmapkd.evaluation.classification import knn_probe, linear_probe
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Task
from cmapkd.models.base import ImageEncoder

_COLUMNS = (
    Column("top-1", ("top1",)),
    Column("top-5", ("top5",)),
    Column("mean per class", ("mean_per_class",)),
)


class LinearProbe(Task):
    title = "Logistic regression on image embeddings, percent"
    reads = ImageEncoder
    needs_texts = False
    trains = True
    columns = _COLUMNS

    def missing(self, subject: Subject) -> str | None:
        embedded = subject.embedded
        return None if bool((embedded.labels >= 0).any()) else f"none of its {len(embedded.ids)} images has a label"

    def score(self, subject: Subject) -> dict[str, Any]:
        train, test = subject.embedded_train, subject.embedded
        scores = linear_probe(
            train.images,
            train.labels,
            test.images,
            test.labels,
            num_classes=subject.num_classes,
            seed=subject.bench.suite.probes.seed,
        )
        return scores.to_dict()


class Neighbours(LinearProbe):
    title = "Nearest neighbours among image embeddings, percent"

    def score(self, subject: Subject) -> dict[str, Any]:
        train, test = subject.embedded_train, subject.embedded
        scores = knn_probe(train.images, train.labels, test.images, test.labels, num_classes=subject.num_classes)
        return scores.to_dict()

"""Task `detection`: a detector on the encoder finds the source's boxes and names them by the text tower."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cmapkd.config import install_advice
from cmapkd.evaluation.detection import PredictedBox, detection_scores
from cmapkd.evaluation.probes.config import DetectionConfig
from cmapkd.evaluation.probes.data import Annotations, ProbeBatches
from cmapkd.evaluation.probes.detector import Detections, DetectorHead, box_targets
from cmapkd.evaluation.probes.features import patch_level
from cmapkd.evaluation.probes.probe import HeadInput
from cmapkd.evaluation.probes.train import scored_images, train_probe
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Task
from cmapkd.models.base import DualEncoder

_SHOWN = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


class Detection(Task):
    title = "Detection by a probe named by the text tower, AP in percent"
    Settings = DetectionConfig
    settings: DetectionConfig
    trains = True
    columns = (
        Column("AP", ("shown", "ap")),
        Column("AP50", ("shown", "ap50")),
        Column("AP75", ("shown", "ap75")),
        Column("small", ("shown", "ap_small")),
        Column("medium", ("shown", "ap_medium")),
        Column("large", ("shown", "ap_large")),
        Column("base", ("shown", "base")),
        Column("novel", ("shown", "novel")),
    )

    def missing(self, subject: Subject) -> str | None:
        if not any(sample.boxes for sample in subject.bench.first_samples):
            return f"none of its first {len(subject.bench.first_samples)} samples has a box"
        if find_spec("faster_coco_eval") is None:  # before a head is trained for nothing
            return f"box AP needs the package faster-coco-eval: install the extra, {install_advice('detection')}"
        return None

    def score(self, subject: Subject) -> dict[str, Any]:
        bench, config = subject.bench, self.settings
        train, scored = bench.train_annotations, bench.annotations
        boxed = [row for row, boxes in enumerate(train.boxes) if boxes]
        if not boxed or not any(scored.boxes):
            where = bench.train if not boxed else bench.source
            raise ValueError(f"{where.name if where else 'the source'} has no boxes")
        base = _names(train)
        names = tuple(sorted({*_names(scored), *base}))
        boxes, labels = _targets(train, boxed, base)
        features = subject.image_features("train")
        base_weights = subject.name_weights(base)

        def batches(encoder: DualEncoder) -> ProbeBatches:
            return ProbeBatches(
                torch.tensor(boxed),
                lambda _epoch, places: {"boxes": boxes[places], "labels": labels[places]},
                ids=train.ids,
                features=None if config.fine_tune else features,
                model=encoder if config.fine_tune else None,
                pictures=bench.train,
                indices=train.indices,
            )

        def make_head() -> DetectorHead:
            return DetectorHead(
                patch_width=patch_level(subject.dual).width,
                embed_dim=subject.dual.embed_dim,
                grid=features.grid,
                names=base_weights,
                scales=config.scales,
                width=config.width,
                depth=config.depth,
            )

        probe = train_probe("detection", subject, config, make_head, batches)
        head = probe.head
        assert isinstance(head, DetectorHead)
        images = scored_images(probe, subject, config)
        weights = subject.name_weights(names).to(bench.device)
        detections = []
        for first in range(0, len(scored), 64):
            rows = slice(first, min(first + 64, len(scored)))
            inputs = HeadInput(images.patches[rows].float().to(bench.device), images.embeddings[rows].to(bench.device))
            detections += head.find(inputs, weights, nms_iou=config.nms_iou, max_boxes=config.max_boxes)
        return _scores(detections, scored, names, base) | {
            "num_images": len(scored),
            "num_boxes": sum(map(len, scored.boxes)),
            "num_classes": len(names),
            "novel_classes": sorted(set(_names(scored)) - set(base)),
            "train_images": len(boxed),
        }


def _names(annotations: Annotations) -> tuple[str, ...]:
    return tuple(sorted({box.name for boxes in annotations.boxes for box in boxes if not box.crowd}))


def _targets(annotations: Annotations, rows: list[int], names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Boxes as shares of the picture's sides and class numbers, padded with label -1; cut to the picture."""
    most = max(len(annotations.boxes[row]) for row in rows)
    boxes, labels = torch.zeros(len(rows), most, 4), torch.full((len(rows), most), -1)
    place = {name: number for number, name in enumerate(names)}
    for number, row in enumerate(rows):
        shares, numbers = box_targets(annotations.boxes[row], annotations.sizes[row], place)
        boxes[number, : len(shares)], labels[number, : len(numbers)] = shares, numbers
    return boxes, labels


def _scores(
    detections: Sequence[Detections], scored: Annotations, names: tuple[str, ...], base: tuple[str, ...]
) -> dict[str, Any]:
    """COCO's figures in pixels of the original pictures; base classes are those that have a box in training."""
    predictions: dict[str, list[PredictedBox]] = {}
    for identity, (width, height), of_image in zip(scored.ids, scored.sizes, detections, strict=True):
        sides = torch.tensor([width, height, width, height], dtype=torch.float32)
        corners = (of_image.boxes.cpu() * sides).tolist()
        predictions[identity] = [
            PredictedBox(left, top, right - left, bottom - top, names[kind], score)
            for (left, top, right, bottom), kind, score in zip(
                corners, of_image.classes.tolist(), of_image.scores.tolist(), strict=True
            )
        ]
    truth = dict(zip(scored.ids, scored.boxes, strict=True))
    novel = tuple(sorted(set(_names(scored)) - set(base)))
    sizes = dict(zip(scored.ids, scored.sizes, strict=True))
    scores = detection_scores(
        predictions, truth, class_names=names, novel=novel if novel else None, image_sizes=sizes
    ).to_dict()
    shown = {key: 100 * scores[key] for key in _SHOWN if scores[key] is not None}
    for group in ("base", "novel"):
        if scores[group] is not None and scores[group]["ap"] is not None:
            shown[group] = 100 * scores[group]["ap"]
    return scores | {"shown": shown}

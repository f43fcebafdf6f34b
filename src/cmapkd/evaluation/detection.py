"""Average precision of boxes: COCO's twelve figures, base and novel classes apart, and Pascal VOC's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmapkd.config import install_advice
from cmapkd.data.types import Box
from cmapkd.evaluation.tools import MissingToolError

Size = tuple[int, int]  # width, height of an image in pixels


class PredictedBox(NamedTuple):
    """A predicted box: left, top, width, height in pixels of the original image, its class name and its confidence."""

    x: float
    y: float
    width: float
    height: float
    name: str
    score: float


@dataclass(frozen=True, slots=True)
class CocoFigures:
    """COCO's twelve, in [0, 1]; None where no object is of that size.

    `ap` is the mean over IoU 0.50 to 0.95, 101 recalls and classes; `ar_1` to `ar_100` allow so many detections of a
    class in an image. Small is below 32 x 32 pixels of area, large above 96 x 96.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar_1: float | None
    ar_10: float | None
    ar_100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None


@dataclass(frozen=True, slots=True)
class ClassGroup:
    """Mean AP over the classes of a group that have objects; None where none has."""

    ap: float | None
    ap50: float | None
    num_classes: int


@dataclass(frozen=True, slots=True)
class DetectionScores:
    """COCO's figures with what they rest on.

    Attributes:
        coco: the twelve figures.
        per_class: AP of every class that has an object.
        base, novel: the classes that were, and were not, learned from; None without `novel`.
        num_images, num_objects, num_crowds, num_detections: what was compared. Crowds are not objects.
        num_outside: detections and objects that reach more than a pixel over their image's edge; None where no sizes
            were given. They are compared as they are, as the reference does.
        num_empty: detections and objects without width or height; compared too, they overlap with nothing.
    """

    coco: CocoFigures
    per_class: dict[str, float] = field(repr=False)
    base: ClassGroup | None
    novel: ClassGroup | None
    num_images: int
    num_objects: int
    num_crowds: int
    num_detections: int
    num_outside: int | None
    num_empty: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data ready for JSON; the twelve figures at the top."""
        values = asdict(self)
        figures: dict[str, Any] = values.pop("coco")
        return figures | values


def detection_scores(
    predictions: Mapping[str, Sequence[PredictedBox]],
    truth: Mapping[str, Sequence[Box]],
    *,
    class_names: Collection[str] | None = None,
    novel: Collection[str] | None = None,
    image_sizes: Mapping[str, Size] | None = None,
) -> DetectionScores:
    """COCO box AP and AR of all images in `truth`.

    Args:
        predictions: detections of each image, by image id, in any order; an image without entry has none.
        truth: the objects of every image, also of those that have none.
        class_names: all classes that may be predicted; None: those of `truth`. Classes without an object do not count.
        novel: classes that the detector never learned boxes of, for open-vocabulary reports; the others are base.
        image_sizes: width and height of the images in pixels, to count boxes that reach outside.
    Raises:
        ValueError: no images or no objects, predictions for unknown images or of unknown classes, a box or score that
            is not finite, a negative width or height, or `novel` classes that do not exist.
        MissingToolError: the extra `detection` is not installed.
    Source: the COCO evaluation of faster-coco-eval, equal to pycocotools to the last digits.
    """
    names = _class_names(truth, class_names)
    _check(predictions, truth, names, novel)
    images = _in_order(truth)
    numbers = {name: number for number, name in enumerate(names, start=1)}
    precision, figures = _evaluate(predictions, truth, images, numbers)
    ap = {name: _known_mean(precision[:, :, numbers[name] - 1]) for name in names}
    ap50 = {name: _known_mean(precision[0, :, numbers[name] - 1]) for name in names}
    split = None if novel is None else ([name for name in names if name not in novel], list(dict.fromkeys(novel)))
    objects = [box for boxes in truth.values() for box in boxes]
    all_detections = [detection for detections in predictions.values() for detection in detections]
    sides = [(box.width, box.height) for box in objects] + [(one.width, one.height) for one in all_detections]
    return DetectionScores(
        coco=figures,
        per_class={name: value for name, value in ap.items() if value is not None},
        base=None if split is None else _group(split[0], ap, ap50),
        novel=None if split is None else _group(split[1], ap, ap50),
        num_images=len(truth),
        num_objects=sum(not box.crowd for box in objects),
        num_crowds=sum(box.crowd for box in objects),
        num_detections=len(all_detections),
        num_outside=None if image_sizes is None else _count_outside(predictions, truth, image_sizes),
        num_empty=sum(not (width and height) for width, height in sides),
    )


def _evaluate(
    predictions: Mapping[str, Sequence[PredictedBox]],
    truth: Mapping[str, Sequence[Box]],
    images: Sequence[str],
    numbers: Mapping[str, int],
) -> tuple[NDArray[np.float64], CocoFigures]:
    """Precision [IoUs, recalls, classes] (-1 where a class has no object) and the twelve figures."""
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval.core.faster_eval_api import COCOeval_faster
    except ImportError:
        raise MissingToolError(
            f"box AP needs the package faster-coco-eval: install the extra, {install_advice('detection')}"
        ) from None
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for place, image in enumerate(images, start=1):
        for box in truth[image]:
            area = box.width * box.height if box.area is None else box.area
            objects.append({
                "id": len(objects) + 1, "image_id": place, "category_id": numbers[box.name],
                "bbox": [box.x, box.y, box.width, box.height], "area": area, "iscrowd": int(box.crowd),
            })  # fmt: skip
        for one in predictions.get(image, ()):
            results.append({
                "id": len(results) + 1, "image_id": place, "category_id": numbers[one.name],
                "bbox": [one.x, one.y, one.width, one.height], "area": one.width * one.height, "iscrowd": 0,
                "score": one.score,
            })  # fmt: skip
    common = {
        "images": [{"id": place} for place in range(1, len(images) + 1)],
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }
    evaluation = COCOeval_faster(
        COCO(common | {"annotations": objects}), COCO(common | {"annotations": results}), "bbox"
    )
    evaluation.run()
    twelve = [None if value < 0 else float(value) for value in evaluation.stats[:12]]
    precision: NDArray[np.float64] = evaluation.eval["precision"][:, :, :, 0, -1]
    return precision, CocoFigures(*twelve)


def _group(names: Sequence[str], ap: Mapping[str, float | None], ap50: Mapping[str, float | None]) -> ClassGroup:
    known = [name for name in names if ap[name] is not None]
    mean, mean50 = (float(np.mean([of[name] for name in known])) if known else None for of in (ap, ap50))
    return ClassGroup(mean, mean50, len(known))


def _known_mean(values: NDArray[np.float64]) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _in_order(truth: Mapping[str, Sequence[Box]]) -> list[str]:
    """Images as the reference sorts them, by number; it settles equal scores by this order."""
    return sorted(truth, key=int) if all(image.isdecimal() for image in truth) else sorted(truth)


def _class_names(truth: Mapping[str, Sequence[Box]], given: Collection[str] | None) -> list[str]:
    occurring = {box.name for boxes in truth.values() for box in boxes}
    if given is None:
        return sorted(occurring)
    if isinstance(given, str) or len(set(given)) < len(given):
        raise ValueError(f"class_names must be a list of different names, got {str(given)[:80]!r}")
    if unknown := sorted(occurring - set(given)):
        raise ValueError(f"there are objects of {len(unknown)} classes that class_names lacks, such as {unknown[0]!r}")
    return list(given)


def _count_outside(
    predictions: Mapping[str, Sequence[PredictedBox]], truth: Mapping[str, Sequence[Box]], sizes: Mapping[str, Size]
) -> int:
    if missing := [image for image in truth if image not in sizes]:
        raise ValueError(f"image_sizes lacks {len(missing)} of {len(truth)} images, the first {missing[0]!r}")
    return sum(
        box.x < -1 or box.y < -1 or box.x + box.width > sizes[image][0] + 1 or box.y + box.height > sizes[image][1] + 1
        for boxes_of in (truth, predictions)
        for image, boxes in boxes_of.items()
        for box in boxes
    )


def _check(
    predictions: Mapping[str, Sequence[PredictedBox]],
    truth: Mapping[str, Sequence[Box]],
    names: Sequence[str],
    novel: Collection[str] | None,
) -> None:
    if not truth or not any(not box.crowd for boxes in truth.values() for box in boxes):
        raise ValueError(f"there is no object in the {len(truth)} images: average precision needs something to find.")
    if unknown := [image for image in predictions if image not in truth]:
        raise ValueError(
            f"{len(unknown)} of {len(predictions)} images with predictions are unknown, the first {unknown[0]!r}: "
            "predictions and truth must be of the same split, with ids written alike."
        )
    known = set(names)
    for image, detections in predictions.items():
        for one in detections:
            if one.name not in known:
                raise ValueError(
                    f"image {image!r} has a detection of {one.name!r}, which is none of the {len(known)} classes: use "
                    "the classes' own names, or pass all that may be predicted as class_names."
                )
            if not math.isfinite(one.score):
                raise ValueError(f"image {image!r} has a detection with score {one.score}: it cannot be ranked.")
    for what, boxes_of in (("object", truth), ("detection", predictions)):
        for image, boxes in boxes_of.items():
            for box in boxes:
                if not math.isfinite(box.x + box.y + box.width + box.height) or box.width < 0 or box.height < 0:
                    raise ValueError(
                        f"image {image!r} has a malformed {what}: {box}. Boxes are left, top, width and height, "
                        "finite, and not left, top, right, bottom."
                    )
    if novel is not None and (unknown := sorted(set(novel) - known)):
        raise ValueError(f"novel names {len(unknown)} classes that do not exist, such as {unknown[0]!r}")


@dataclass(frozen=True, slots=True)
class VocScores:
    """Pascal VOC's average precision at one overlap, in [0, 1].

    Attributes:
        mean_ap: over the classes that have objects.
        per_class: of each of these classes.
    """

    mean_ap: float
    per_class: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data ready for JSON."""
        return asdict(self)


def voc_scores(
    predictions: Mapping[str, Sequence[PredictedBox]],
    truth: Mapping[str, Sequence[Box]],
    *,
    iou: float = 0.5,
    points: Literal["every", 11] = "every",
    inclusive: bool = True,
) -> VocScores:
    """Average precision as VOC 2010-2012 (`every` point) or VOC 2007 (11 points) define it.

    A detection, in order of score, is right if the object of its class that it overlaps most reaches `iou` and no
    better detection has it. `crowd` boxes are VOC's difficult ones: no objects, and a detection of one does not count.

    Args:
        predictions, truth: as in `detection_scores`; detections of classes without any object do not count.
        iou: least intersection over union, in (0, 1].
        inclusive: whether a box's last pixel belongs to it, which makes it a pixel wider, as in VOC's own tool.
    Raises:
        ValueError: as `detection_scores`, or an `iou` or `points` out of range.
    Source: Everingham et al. 2010 and 2015 (VOC development kit).
    """
    if not 0 < iou <= 1 or points not in ("every", 11):
        raise ValueError(f"iou must be above 0 and at most 1, and points 'every' or 11; got {iou} and {points!r}")
    names = {box.name for boxes in truth.values() for box in boxes if not box.crowd}
    _check(
        predictions,
        truth,
        sorted(names | {one.name for detections in predictions.values() for one in detections}),
        None,
    )
    right = _voc_matches(predictions, truth, iou, float(inclusive))
    num_objects: defaultdict[str, int] = defaultdict(int)
    for boxes in truth.values():
        for box in boxes:
            num_objects[box.name] += not box.crowd
    per_class = {name: _voc_ap(np.array(right[name], dtype=bool), num_objects[name], points) for name in sorted(names)}
    return VocScores(sum(per_class.values()) / len(per_class), per_class)


def _voc_matches(
    predictions: Mapping[str, Sequence[PredictedBox]], truth: Mapping[str, Sequence[Box]], iou: float, extra: float
) -> defaultdict[str, list[bool]]:
    """For each class whether its detections are right, best score first; those of difficult objects are left out."""
    ranked = [(image, one) for image in _in_order(truth) for one in predictions.get(image, ())]
    taken: set[tuple[str, int]] = set()
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for image, one in sorted(ranked, key=lambda pair: -pair[1].score):
        overlaps = [_iou(one, box, extra) if box.name == one.name else 0.0 for box in truth[image]]
        best = max(range(len(overlaps)), key=overlaps.__getitem__, default=-1)
        hit = best >= 0 and overlaps[best] >= iou
        if hit and truth[image][best].crowd:
            continue
        right[one.name].append(hit and (image, best) not in taken)
        if hit:
            taken.add((image, best))
    return right


def _iou(a: PredictedBox, b: Box, extra: float) -> float:
    width = min(a.x + a.width, b.x + b.width) - max(a.x, b.x) + extra
    height = min(a.y + a.height, b.y + b.height) - max(a.y, b.y) + extra
    if width <= 0 or height <= 0:
        return 0.0
    both = (a.width + extra) * (a.height + extra) + (b.width + extra) * (b.height + extra)
    return width * height / (both - width * height)


def _voc_ap(right: NDArray[np.bool_], num_objects: int, points: Literal["every", 11]) -> float:
    hits = right.cumsum()
    recall = hits / num_objects
    precision = hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or above
    if points == 11:
        reached = np.searchsorted(recall, np.linspace(0, 1, 11) - 1e-12)
        return float(np.append(envelope, 0.0)[reached].mean())
    return float((np.diff(recall, prepend=0.0) * envelope).sum())

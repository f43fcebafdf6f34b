"""COCO's twelve figures against its tools, VOC's average precision against a published sample, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from cmapkd.data.types import Box
from cmapkd.evaluation.detection import PredictedBox, detection_scores, voc_scores
from cmapkd.evaluation.tools import MissingToolError

Truth = dict[str, list[Box]]
Found = dict[str, list[PredictedBox]]

ORDER = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def read_coco(shared: Path) -> tuple[Found, Truth, list[str], dict[str, tuple[int, int]]]:
    given = json.loads((shared / "metric_parity" / "coco_instances_val2014_100.json").read_text())
    results = json.loads((shared / "metric_parity" / "coco_fakebbox100_results.json").read_text())
    names = {category["id"]: category["name"] for category in given["categories"]}
    truth: Truth = {str(image["id"]): [] for image in given["images"]}
    for a in given["annotations"]:
        truth[str(a["image_id"])].append(Box(*a["bbox"], names[a["category_id"]], bool(a["iscrowd"]), a["area"]))
    found: Found = {}
    for r in results:
        found.setdefault(str(r["image_id"]), []).append(PredictedBox(*r["bbox"], names[r["category_id"]], r["score"]))
    return found, truth, list(names.values()), {str(i["id"]): (i["width"], i["height"]) for i in given["images"]}


def test_figures_of_the_reference(shared: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    found, truth, names, sizes = read_coco(shared)
    expected = json.loads((shared / "metric_parity" / "coco_fakebbox100.expected.json").read_text())
    novel = names[10:20]
    scores = detection_scores(found, truth, class_names=names, image_sizes=sizes, novel=novel)
    figures = scores.to_dict()
    for theirs, ours in zip(ORDER, list(figures)[:12], strict=True):
        assert figures[ours] == pytest.approx(expected["computed"][theirs], abs=1e-12), theirs
        assert figures[ours] == pytest.approx(expected["published_3_digits"][theirs], abs=0.5e-3), theirs
    assert (scores.num_images, scores.num_objects, scores.num_crowds, scores.num_detections) == (100, 830, 9, 734)
    assert (scores.num_outside, scores.num_empty) == (0, 0)
    assert scores.base is not None
    assert scores.novel is not None
    of_novel = [value for name, value in scores.per_class.items() if name in novel]
    assert scores.novel.num_classes == len(of_novel) > 3
    assert scores.novel.ap == pytest.approx(sum(of_novel) / len(of_novel))
    total = scores.base.num_classes * (scores.base.ap or 0) + sum(of_novel)
    assert total / len(scores.per_class) == pytest.approx(figures["ap"])
    assert json.loads(json.dumps(figures))["novel"]["num_classes"] == len(of_novel)


def random_boxes(seed: int, *, images: int = 40, classes: int = 6) -> tuple[Found, Truth]:
    """Objects of all sizes, crowds, detections near and far from them, and many equal scores."""
    draws = random.Random(seed)
    truth: Truth = {}
    found: Found = {}
    for image in range(images):
        boxes = []
        for _ in range(draws.randrange(8)):
            side = draws.choice([12, 40, 150])
            width, height = side * draws.uniform(0.6, 1.4), side * draws.uniform(0.6, 1.4)
            box = [draws.uniform(0, 300), draws.uniform(0, 200), width, height]
            area = draws.choice([None, width * height * 0.6])
            boxes.append(Box(*box, f"class {draws.randrange(classes)}", draws.random() < 0.1, area))
        truth[str(image)] = boxes
        near = [
            PredictedBox(
                box.x + draws.gauss(0, box.width / 12),
                box.y + draws.gauss(0, box.height / 12),
                box.width * draws.uniform(0.8, 1.2),
                box.height * draws.uniform(0.8, 1.2),
                box.name if draws.random() < 0.8 else "class 0",
                round(draws.random(), 1),
            )
            for box in boxes
            for _ in range(draws.randrange(4))
        ]
        if draws.random() < 0.9:
            found[str(image)] = near + [PredictedBox(5, 5, 30, 30, "class 1", 0.5)] * draws.randrange(3)
    return found, truth


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_pycocotools_with_ties_and_crowds(seed: int) -> None:
    pytest.importorskip("faster_coco_eval")
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    found, truth = random_boxes(seed)
    numbers = {f"class {number}": number + 1 for number in range(6)}
    objects = [
        {
            "id": 0, "image_id": int(image), "category_id": numbers[b.name], "bbox": [b.x, b.y, b.width, b.height],
            "area": b.width * b.height if b.area is None else b.area, "iscrowd": int(b.crowd),
        }
        for image, boxes in truth.items() for b in boxes
    ]  # fmt: skip
    for number, one in enumerate(objects, start=1):
        one["id"] = number
    results = [
        {"image_id": int(image), "category_id": numbers[d.name], "bbox": list(d[:4]), "score": d.score}
        for image, detections in found.items()
        for d in detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        given = coco.COCO()
        given.dataset = {
            "images": [{"id": int(image)} for image in truth],
            "categories": [{"id": number, "name": name} for name, number in numbers.items()],
            "annotations": objects,
            "info": {},
        }
        given.createIndex()
        theirs = cocoeval.COCOeval(given, given.loadRes(results), "bbox")
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    ours = detection_scores(found, truth, class_names=list(numbers))
    assert list(ours.to_dict().values())[:12] == pytest.approx(list(theirs.stats), abs=1e-12)


def test_perfect_and_absent_detections() -> None:
    pytest.importorskip("faster_coco_eval")
    truth = {"a": [Box(0, 0, 10, 10, "cat"), Box(20, 20, 50, 50, "dog")], "b": []}
    perfect = {"a": [PredictedBox(0, 0, 10, 10, "cat", 0.9), PredictedBox(20, 20, 50, 50, "dog", 0.1)]}
    scores = detection_scores(perfect, truth)
    assert scores.to_dict()["ap"] == pytest.approx(1)
    assert scores.coco.ap_large is None
    assert scores.per_class == pytest.approx({"cat": 1, "dog": 1})
    assert (scores.base, scores.novel, scores.num_outside) == (None, None, None)
    assert detection_scores({}, truth).coco.ap == 0
    assert detection_scores({"b": perfect["a"]}, truth).coco.ap == 0


def test_a_class_without_objects_neither_helps_nor_hurts() -> None:
    pytest.importorskip("faster_coco_eval")
    truth = {"a": [Box(0, 0, 10, 10, "cat")]}
    found = {"a": [PredictedBox(0, 0, 10, 10, "cat", 0.5), PredictedBox(0, 0, 10, 10, "dog", 0.9)]}
    scores = detection_scores(found, truth, class_names=["cat", "dog"], novel=["dog"])
    assert scores.coco.ap == pytest.approx(1)
    assert scores.novel is not None
    assert (scores.novel.ap, scores.novel.ap50, scores.novel.num_classes) == (None, None, 0)
    assert scores.base is not None
    assert scores.base.num_classes == 1


def test_crowds_count_neither_way() -> None:
    pytest.importorskip("faster_coco_eval")
    truth = {"a": [Box(0, 0, 10, 10, "cat"), Box(20, 20, 80, 80, "cat", crowd=True)]}
    found = {"a": [PredictedBox(0, 0, 10, 10, "cat", 0.5), PredictedBox(30, 30, 20, 20, "cat", 0.9)]}
    assert detection_scores(found, truth).coco.ap == pytest.approx(1)
    found["a"].append(PredictedBox(70, 0, 20, 20, "cat", 0.9))
    assert (detection_scores(found, truth).coco.ap or 1) < 0.6


def test_boxes_outside_and_empty_boxes_are_counted() -> None:
    pytest.importorskip("faster_coco_eval")
    truth = {"a": [Box(0, 0, 100.5, 50, "cat"), Box(5, 5, 0, 4, "cat")]}
    found = {"a": [PredictedBox(-5, 0, 9, 9, "cat", 0.5), PredictedBox(90, 0, 20, 9, "cat", 0.5)]}
    scores = detection_scores(found, truth, image_sizes={"a": (100, 50)})
    assert (scores.num_outside, scores.num_empty) == (2, 1)
    with pytest.raises(ValueError, match=r"image_sizes lacks 1 of 1 images, the first 'a'"):
        detection_scores(found, truth, image_sizes={})


CAT = Box(0, 0, 10, 10, "cat")
FOUND = PredictedBox(0, 0, 10, 10, "cat", 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": {}, "predictions": {}}, "no object in the 0 images"),
        ({"truth": {"a": [Box(0, 0, 9, 9, "cat", crowd=True)]}}, "no object in the 1 images"),
        ({"predictions": {"a": [FOUND], "z": []}}, "1 of 2 images with predictions are unknown, the first 'z'"),
        ({"predictions": {"a": [FOUND._replace(name="dog")]}}, "detection of 'dog', which is none of the 1 classes"),
        ({"predictions": {"a": [FOUND._replace(score=float("nan"))]}}, "score nan: it cannot be ranked"),
        ({"predictions": {"a": [FOUND._replace(x=float("inf"))]}}, "malformed detection"),
        ({"predictions": {"a": [FOUND._replace(width=-3)]}}, "malformed detection.*not left, top, right, bottom"),
        ({"truth": {"a": [CAT, Box(0, 0, float("nan"), 1, "cat")]}}, "malformed object"),
    ],
)
def test_wrong_input(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"predictions": {"a": [FOUND]}, "truth": {"a": [CAT]}} | changes
    with pytest.raises(ValueError, match=message):
        detection_scores(**arguments)
    if "which is none" not in message:  # VOC counts no classes but those that have objects
        with pytest.raises(ValueError, match=message):
            voc_scores(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ["dog"]}, "1 classes that class_names lacks, such as 'cat'"),
        ({"class_names": ["cat", "cat"]}, "list of different names"),
        ({"class_names": "cat"}, "list of different names"),
        ({"novel": ["dog"]}, "novel names 1 classes that do not exist, such as 'dog'"),
    ],
)
def test_wrong_classes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detection_scores({"a": [FOUND]}, {"a": [CAT]}, **options)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(MissingToolError, match="uv sync --inexact --extra detection"):
        detection_scores({"a": [FOUND]}, {"a": [CAT]})


@pytest.mark.parametrize(
    ("points", "inclusive", "expected", "digits"),
    [("every", True, 0.2457, 0.5e-4), (11, True, 0.2684, 0.5e-4), ("every", False, 0.2254, 0.5e-4)],
)
def test_published_voc_sample(points: Any, inclusive: bool, expected: float, digits: float, shared: Path) -> None:
    sample = json.loads((shared / "metric_parity" / "voc_ap_sample.json").read_text())
    assert sample["published"]["AP_every_point"] == 0.2457
    assert sample["published"]["AP_11_point"] == 0.2684
    truth = {
        image: [Box(*map(float, numbers), name) for name, *numbers in boxes]
        for image, boxes in sample["ground_truth"].items()
    }
    found = {
        image: [PredictedBox(*map(float, numbers), name, float(score)) for name, score, *numbers in boxes]
        for image, boxes in sample["detections"].items()
    }
    scores = voc_scores(found, truth, iou=sample["published"]["iou_threshold"], points=points, inclusive=inclusive)
    assert scores.mean_ap == pytest.approx(expected, abs=digits)
    assert scores.to_dict() == {"mean_ap": scores.mean_ap, "per_class": {"person": scores.mean_ap}}


def test_voc_by_hand() -> None:
    """Two objects; the detections are right, a second one of the same object, of a difficult one, right, far away."""
    truth = {"a": [CAT, Box(50, 50, 10, 10, "cat"), Box(0, 50, 10, 10, "cat", crowd=True)], "b": []}
    found = {
        "a": [
            FOUND._replace(score=0.9),
            FOUND._replace(score=0.8),
            FOUND._replace(y=50, score=0.7),
            FOUND._replace(x=50, y=50, score=0.6),
        ],
        "b": [FOUND._replace(score=0.5), FOUND._replace(name="dog", score=1.0)],
    }
    # precision 1 at recall 1/2, then 2/3 at recall 1
    assert voc_scores(found, truth).mean_ap == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert voc_scores(found, truth, points=11).mean_ap == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert voc_scores({}, truth).per_class == {"cat": 0}


def test_voc_wrong_options() -> None:
    for options in ({"iou": 0}, {"iou": 1.2}, {"points": 101}):
        with pytest.raises(ValueError, match="iou must be above 0 and at most 1, and points"):
            voc_scores({}, {"a": [CAT]}, **options)  # type: ignore[arg-type]

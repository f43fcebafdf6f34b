"""Box AP of 5,000 drawn images against pycocotools: `python benchmarks/detection.py --json out.json`.

Both get what they take: pycocotools dictionaries in COCO's form, ours the `Box` and `PredictedBox` objects of a source.
Their calls alternate in one process, so what else happens on the machine meets both; the twelve figures are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cmapkd.data.types import Box
from cmapkd.evaluation.detection import PredictedBox, detection_scores
from retrieval import processor

NUM_CLASSES = 80


def draw(num_images: int) -> tuple[dict[str, list[PredictedBox]], dict[str, list[Box]]]:
    """About 7 objects an image, as in COCO val2017, and 30 detections: near them, of other classes, and nowhere."""
    draws = random.Random(0)
    truth: dict[str, list[Box]] = {}
    found: dict[str, list[PredictedBox]] = {}
    for image in map(str, range(num_images)):
        boxes = []
        for _ in range(draws.randrange(15)):
            width, height = (draws.choice((20, 60, 200)) * draws.uniform(0.6, 1.4) for _ in range(2))
            place = (draws.uniform(0, 640 - width), draws.uniform(0, 480 - height))
            boxes.append(Box(*place, width, height, f"class {draws.randrange(NUM_CLASSES)}", draws.random() < 0.01))
        truth[image] = boxes
        found[image] = []
        for _ in range(30):
            if boxes and draws.random() < 0.6:
                near = draws.choice(boxes)
                place = (near.x + draws.gauss(0, near.width / 10), near.y + draws.gauss(0, near.height / 10))
                sides = (near.width * draws.uniform(0.8, 1.2), near.height * draws.uniform(0.8, 1.2))
                name = near.name if draws.random() < 0.8 else f"class {draws.randrange(NUM_CLASSES)}"
            else:
                place, sides = (draws.uniform(0, 500), draws.uniform(0, 400)), (50.0, 50.0)
                name = f"class {draws.randrange(NUM_CLASSES)}"
            found[image].append(PredictedBox(*place, *sides, name, round(draws.random(), 4)))
    return found, truth


def in_cocos_form(
    found: dict[str, list[PredictedBox]], truth: dict[str, list[Box]]
) -> tuple[dict[str, Any], list[Any]]:
    numbers = {f"class {number}": number + 1 for number in range(NUM_CLASSES)}
    objects = [
        {"image_id": int(image), "category_id": numbers[b.name], "bbox": [b.x, b.y, b.width, b.height],
         "area": b.width * b.height, "iscrowd": int(b.crowd)}
        for image, boxes in truth.items() for b in boxes
    ]  # fmt: skip
    for number, each in enumerate(objects, start=1):
        each["id"] = number
    results = [
        {"image_id": int(image), "category_id": numbers[d.name], "bbox": list(d[:4]), "score": d.score}
        for image, detections in found.items() for d in detections
    ]  # fmt: skip
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    images = [{"id": int(image)} for image in truth]
    return {"images": images, "categories": categories, "annotations": objects, "info": {}}, results


def reference(dataset: dict[str, Any], results: list[Any]) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall and CPU seconds of a call, and what it returned."""
    start, start_cpu = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - start, time.process_time() - start_cpu, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    found, truth = draw(options.images)
    dataset, results = in_cocos_form(found, truth)
    detection_scores({}, {"0": [Box(0, 0, 1, 1, "class 0")]})  # the library is loaded outside the measurement
    seconds: dict[str, list[tuple[float, float]]] = {"pycocotools": [], "cmapkd": []}
    difference = 0.0
    for _ in range(options.rounds):
        *theirs, expected = timed(lambda: reference(dataset, results))
        *ours, scores = timed(lambda: detection_scores(found, truth))
        seconds["pycocotools"].append((theirs[0], theirs[1]))
        seconds["cmapkd"].append((ours[0], ours[1]))
        figures = list(scores.to_dict().values())[:12]
        difference = max(difference, *(abs(a - b) for a, b in zip(figures, expected, strict=True)))
    cpu = {name: statistics.median(each[1] for each in pairs) for name, pairs in seconds.items()}
    result = {
        "images": options.images,
        "objects": sum(map(len, truth.values())),
        "detections": sum(map(len, found.values())),
        "classes": NUM_CLASSES,
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("pycocotools", "faster-coco-eval")},
        "wall_seconds": {name: [round(each[0], 2) for each in pairs] for name, pairs in seconds.items()},
        "cpu_seconds": {name: [round(each[1], 2) for each in pairs] for name, pairs in seconds.items()},
        "ratio_of_cpu_seconds": round(cpu["cmapkd"] / cpu["pycocotools"], 3),
        "largest_difference_of_a_figure": difference,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

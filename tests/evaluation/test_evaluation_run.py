"""`evaluate`: which tasks are measured, from one embedding, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from cmapkd.config import ConfigError
from cmapkd.evaluation import EvaluationConfig, evaluate
from cmapkd.evaluation.embed import embed
from cmapkd.evaluation.retrieval import retrieval
from cmapkd.evaluation.tasks.retrieval import modality_gap
from cmapkd.evaluation.zero_shot import zero_shot
from cmapkd.models.texts import class_vectors
from cmapkd.models.tiny import TinyDualEncoder

Make = Callable[..., Any]
CLASSES = ["cat", "dog", "boat"]


def test_both_tasks_from_one_embedding(model: TinyDualEncoder, make_source: Make) -> None:
    source = make_source(12, labels=[n % 3 for n in range(12)], class_names=CLASSES, broken=[4])
    scores = evaluate(model, source, EvaluationConfig(), device="cpu")
    embedded = embed(model, source, batch_size=256, device="cpu")
    weights = class_vectors(model, CLASSES, ["a photo of a {}."], batch_size=256, device="cpu")
    assert scores == {
        "retrieval": {
            **retrieval(embedded.images, embedded.texts, embedded.image_of_text),
            "modality_gap": modality_gap(embedded),
        },
        "zero_shot": zero_shot(embedded.images, embedded.labels, weights),
        "params": model.num_parameters(),
        "bad_samples": 1,
        "scored": {"images": 11, "captions": len(embedded.captions), "skipped": 1, "samples": 12, "limit": None},
    }
    assert json.loads(json.dumps(scores)) == scores


def test_batch_size_workers_and_limit_reach_the_loader(model: TinyDualEncoder, make_source: Make) -> None:
    config = EvaluationConfig(batch_size=2, workers=1, limit=5)
    scores = evaluate(model, make_source(9), config, device="cpu")["retrieval"]
    first_five = evaluate(model, make_source(9), EvaluationConfig(limit=5), device="cpu")["retrieval"]
    assert scores["num_images"] == 5
    assert scores["t2i"] == pytest.approx(first_five["t2i"])
    assert scores["i2t"] == pytest.approx(first_five["i2t"])


def test_auto_leaves_out_what_the_source_has_not(model: TinyDualEncoder, make_source: Make) -> None:
    unlabelled = evaluate(model, make_source(4), device="cpu")
    assert set(unlabelled) == {"retrieval", "params", "bad_samples", "scored"}
    silent = make_source(4, captions=[()] * 4, labels=[0, 1, 2, None], class_names=CLASSES)
    scores = evaluate(model, silent, device="cpu")
    assert set(scores) == {"zero_shot", "params", "bad_samples", "scored"}
    assert scores["zero_shot"]["num_images"] == 3


def test_a_named_task_that_cannot_be_measured_is_refused(model: TinyDualEncoder, make_source: Make) -> None:
    with pytest.raises(ValueError, match="memory cannot be evaluated for zero_shot: none of its 4 images has a label"):
        evaluate(model, make_source(4), EvaluationConfig(tasks=("zero_shot",)), device="cpu")
    with pytest.raises(ValueError, match="zero_shot: its labels have no names"):
        evaluate(model, make_source(4, labels=[0] * 4), EvaluationConfig(tasks=("zero_shot",)), device="cpu")
    silent = make_source(4, captions=[()] * 4)
    with pytest.raises(ValueError, match="retrieval: none of its 4 images has a caption"):
        evaluate(model, silent, EvaluationConfig(tasks=("retrieval",)), device="cpu")
    with pytest.raises(ValueError, match=r"retrieval: none .*; zero_shot: none"):
        evaluate(model, silent, device="cpu")


def test_a_wrong_name_is_refused_before_anything_is_read(model: TinyDualEncoder, make_source: Make) -> None:
    unreadable = make_source(4, class_names=CLASSES, broken=range(4))
    with pytest.raises(ConfigError, match="did you mean 'plain'"):
        evaluate(model, unreadable, EvaluationConfig(templates="plian"), device="cpu")
    with pytest.raises(ValueError, match="imagenet has 1000 names"):
        evaluate(model, unreadable, EvaluationConfig(class_names="imagenet"), device="cpu")


def test_labels_beyond_the_class_names(model: TinyDualEncoder, make_source: Make) -> None:
    source = make_source(4, labels=[0, 1, 2, 3], class_names=CLASSES)
    with pytest.raises(ValueError, match="labels up to 3, but only 3 class names"):
        evaluate(model, source, device="cpu")


def test_shared_captions_switch(model: TinyDualEncoder, make_source: Make) -> None:
    source = make_source(4, captions=[("a boat",), ("A boat.",), ("a boat",), ("a boat",)])
    standard = evaluate(model, source, EvaluationConfig(tasks=("retrieval",)), device="cpu")
    shared = evaluate(model, source, EvaluationConfig(tasks=("retrieval",), shared_captions=True), device="cpu")
    assert standard["retrieval"]["t2i"]["r@1"] == pytest.approx(25)
    assert shared["retrieval"]["t2i"]["r@1"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        ("auto", "auto"),
        ("retrieval", ("retrieval",)),
        (["zero_shot"], ("zero_shot",)),
        (["retrieval", "zero_shot", "retrieval"], ("retrieval", "zero_shot")),
    ],
)
def test_tasks_in_every_spelling(given: Any, tasks: Any) -> None:
    config = EvaluationConfig.from_mapping({"tasks": given})
    assert config.tasks == tasks
    assert EvaluationConfig.from_mapping(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": []}, "must be auto, or one or more"),
        ({"tasks": 3}, "must be auto, or one or more"),
        ({"bach_size": 3}, "did you mean 'batch_size'"),
        ({"batch_size": 0}, "batch_size: .*>= 1"),
    ],
)
def test_config_problems_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig.from_mapping(values)

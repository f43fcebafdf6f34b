"""Task `accuracy` of classifiers and of image-text models; which other tasks measure a classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cmapkd.evaluation.config import SuiteConfig
from cmapkd.evaluation.embed import embed
from cmapkd.evaluation.suite import evaluate_models
from cmapkd.models import Classifier
from cmapkd.models.classifier import AnswerRule, ClassHeadConfig
from helpers import MemorySource, make_classifier, make_model

NAMES = ("zero", "one", "two", "three", "four")


class Named(MemorySource):
    class_names = NAMES  # type: ignore[assignment]


def classifier(names: tuple[str, ...] = NAMES) -> Classifier:
    torch.manual_seed(0)
    model = make_classifier()
    heads = {"labels": ClassHeadConfig(), "teacher": ClassHeadConfig()}
    model.set_heads(names, heads, AnswerRule(heads=("labels", "teacher"), alpha=0.5, beta=2.0))
    return model.eval()


def scores_of(models: dict[str, Any], *tasks: str, **options: Any) -> dict[str, Any]:
    config = SuiteConfig(tasks=tasks or "auto", batch_size=8)
    return evaluate_models(models, Named(24), config, device="cpu", **options)


def test_accuracy_is_counted_by_hand() -> None:
    model = classifier()
    found = scores_of({"m": model}, "accuracy", "calibration")["m"]
    source = Named(24)
    samples = [source[place] for place in range(24) if source[place].label is not None]
    p = model.classify([sample.image for sample in samples])
    truth = torch.tensor([sample.label for sample in samples])
    right = (p.argmax(1) == truth).double()
    accuracy = found["accuracy"]
    assert accuracy["top1"] == pytest.approx(100 * float(right.mean()))
    assert accuracy["num_images"] == len(samples) == 16
    assert accuracy["per_class"] == {
        name: pytest.approx(100 * float(right[truth == place].mean())) for place, name in enumerate(NAMES)
    }
    logits = embed(model, source, batch_size=8, device="cpu").logits["teacher"]
    labels = torch.tensor([-1 if source[place].label is None else source[place].label for place in range(24)])
    alone = (logits.argmax(1) == labels)[labels >= 0].double().mean()
    assert accuracy["heads"]["teacher"] == pytest.approx(100 * float(alone))
    assert found["calibration"]["nll"] == pytest.approx(-float(p.gather(1, truth[:, None]).log().mean()), rel=1e-5)
    assert found["scored"] == {"images": 24, "captions": 0, "skipped": 0, "samples": 24, "limit": None}


def test_an_image_text_model_beside_a_classifier_answers_by_texts() -> None:
    both = scores_of({"teacher": make_model(), "student": classifier()})
    assert [*both["student"]][:1] == ["accuracy"]
    assert "zero_shot" not in both["student"]
    alone = scores_of({"teacher": make_model()}, "zero_shot", "accuracy")["teacher"]
    assert both["teacher"]["accuracy"] == alone["accuracy"] == alone["zero_shot"]
    assert "accuracy" not in scores_of({"teacher": make_model()})["teacher"]


def test_features_of_a_classifier_can_be_probed() -> None:
    other = MemorySource(30)
    other.name = "other"
    found = scores_of({"m": classifier()}, "knn", train=other)["m"]
    assert 0 <= found["knn"]["top1"] <= 100


@pytest.mark.parametrize("task", ["retrieval", "zero_shot", "efficiency", "agreement"])
def test_tasks_that_need_texts_are_refused(task: str) -> None:
    with pytest.raises(ValueError, match=f"{task}: it is for a model that embeds pictures and texts, and m classifies"):
        scores_of({"m": classifier()}, task)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="its class 4 is 'four', and that of m is 'five'"):
        scores_of({"m": classifier((*NAMES[:4], "five"))}, "accuracy")
    with pytest.raises(ValueError, match="it has 5 classes, and m knows 3"):
        scores_of({"m": classifier(NAMES[:3])}, "accuracy")
    with pytest.raises(ValueError, match="m has no classes yet"):
        scores_of({"m": make_classifier()}, "accuracy")

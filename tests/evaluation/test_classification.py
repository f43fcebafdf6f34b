"""Probes of frozen embeddings: against scikit-learn's solution, loops, and the promise to learn nothing from test."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmapkd.evaluation.classification import _fit, _hold_out, knn_probe, linear_probe, score_classes

# Weights of class 0, and biases, of LogisticRegression(C=1 / (strength * 120), tol=1e-12) in scikit-learn 1.9.1 on
# `blobs()`, and its accuracy on the test part.
SKLEARN: dict[float, Any] = {
    0.001: (
        [0.4908323185806, 0.1204236535348, 0.2145223423280, -0.4149655262697, 0.0026270033166, -0.2034457647773],
        [0.5595947714621, 0.1321866927258, -0.1573375440537, -0.5344440201341],
        70.0,
    ),
    0.1: (
        [0.3275868664686, 0.0808808293175, 0.1596409390421, -0.3254161559588, 0.0189666686366, -0.0874101881093],
        [0.2522144434170, 0.1970055177928, -0.2895960630365, -0.1596238981733],
        71.25,
    ),
}


def blobs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """120 and 80 points of four classes that overlap; from numpy's legacy generator, whose numbers never change."""
    draws = np.random.RandomState(3)
    centres = draws.randn(4, 6)
    parts: list[Tensor] = []
    for size in (120, 80):
        labels = draws.randint(0, 4, size)
        parts += [torch.tensor(centres[labels] + 1.5 * draws.randn(size, 6)), torch.tensor(labels)]
    return parts[0], parts[1], parts[2], parts[3]


@pytest.mark.parametrize("strength", SKLEARN)
def test_linear_probe_is_scikit_learns(strength: float) -> None:
    weights, biases, accuracy = SKLEARN[strength]
    train, labels, test, test_labels = blobs()
    (weight, bias), converged = _fit(train, labels, 4, strength, 1000, None)
    assert converged
    assert weight[0].tolist() == pytest.approx(weights, abs=1e-5)
    assert bias.tolist() == pytest.approx(biases, abs=1e-5)
    scores = linear_probe(train, labels, test, test_labels, strengths=[strength])
    assert scores.top1 == pytest.approx(accuracy)
    assert scores.settings == {"strength": strength, "validation_top1": {}, "num_train": 120, "converged": True}
    assert (scores.num_classes, scores.num_images, scores.top5) == (4, 80, None)


def test_the_penalty_is_chosen_without_the_test_images() -> None:
    train, labels, test, test_labels = blobs()
    chosen = linear_probe(train, labels, test, test_labels)
    wrong = linear_probe(train, labels, test.flip(0) * 3, (test_labels + 1) % 4)
    assert chosen.settings == wrong.settings
    assert len(chosen.settings["validation_top1"]) == 9
    best = max(chosen.settings["validation_top1"].values())
    equal = [float(name) for name, value in chosen.settings["validation_top1"].items() if value == best]
    assert chosen.settings["strength"] == max(equal)  # the stronger of equals
    alone = linear_probe(train, labels, test, test_labels, strengths=[chosen.settings["strength"]])
    assert alone.to_dict() | {"settings": 0} == chosen.to_dict() | {"settings": 0}  # fitted on all of train
    json.dumps(chosen.to_dict())


def test_held_out_images_are_the_same_share_of_every_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 11 + [2] * 2 + [3])
    held_out = _hold_out(labels, 0.2, seed=1)
    assert [int(held_out[labels == label].sum()) for label in range(4)] == [10, 2, 1, 0]
    assert torch.equal(held_out, _hold_out(labels, 0.2, seed=1))
    assert not torch.equal(held_out, _hold_out(labels, 0.2, seed=2))
    assert int(_hold_out(torch.tensor([0, 0, 0]), 0.99, seed=0).sum()) == 2  # never all of a class


def test_linear_probe_says_when_it_did_not_converge() -> None:
    train, labels, test, test_labels = blobs()
    scores = linear_probe(train, labels, test, test_labels, strengths=[1e-6], max_steps=2)
    assert scores.settings["converged"] is False


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (5, 0.07), (7, 1.0), (500, 0.5)])
def test_knn_probe_is_its_definition(neighbours: int, temperature: float) -> None:
    train, labels, test, test_labels = blobs()
    right = 0
    for row, label in zip(test, test_labels, strict=True):
        cosine = [float(torch.nn.functional.cosine_similarity(row, other, dim=0)) for other in train]
        nearest = sorted(range(120), key=lambda i: -cosine[i])[:neighbours]
        votes = [sum(np.exp(cosine[i] / temperature) for i in nearest if labels[i] == c) for c in range(4)]
        right += int(np.argmax(votes)) == int(label)
    scores = knn_probe(train, labels, test, test_labels, neighbours=neighbours, temperature=temperature)
    assert scores.top1 == pytest.approx(100 * right / 80)
    assert scores.settings == {"neighbours": min(neighbours, 120), "temperature": temperature, "num_train": 120}


def test_knn_probe_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = knn_probe(*blobs())
    monkeypatch.setattr("cmapkd.evaluation.classification._BLOCK_SCORES", 7 * 120)
    assert knn_probe(*blobs()) == whole


def test_a_class_that_train_lacks_is_always_missed() -> None:
    train, labels, test, test_labels = blobs()
    with pytest.raises(ValueError, match="labels up to 3, but scores of only 3 classes"):
        knn_probe(train, labels.clamp_max(2), test, test_labels)
    scores = knn_probe(train, labels.clamp_max(2), test, test_labels, num_classes=4)
    assert scores.num_classes == 4
    assert scores.top1 <= 100 * float((test_labels < 3).double().mean())


def test_score_classes_by_hand() -> None:
    scores = torch.tensor([[3.0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [9, 0, 0, 0, 0, 0]])
    result = score_classes(scores, torch.tensor([0, 0, 2, -1]))
    assert result.top1 == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    assert result.top5 == pytest.approx(100 * (1 + 1 + 4 / 5) / 3)
    assert result.mean_per_class == pytest.approx(100 * (0.75 + 0) / 2)
    assert (result.num_classes, result.num_images) == (6, 3)
    assert score_classes(torch.zeros(8, 10), torch.arange(8)).top1 == pytest.approx(10)  # chance


def test_unlabelled_images_are_left_out() -> None:
    train, labels, test, test_labels = blobs()
    more, none = torch.cat([train, train + 9]), torch.cat([labels, torch.full((120,), -1)])
    assert knn_probe(more, none, test, test_labels) == knn_probe(train, labels, test, test_labels)
    one = {"strengths": [0.1]}
    assert linear_probe(more, none, test, test_labels, **one) == linear_probe(train, labels, test, test_labels, **one)  # type: ignore[arg-type]


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": torch.ones(4, 3)}, "embeddings of both must be as wide"),
        ({"train_labels": torch.zeros(3).long()}, "one label for each image"),
        ({"train": torch.full((4, 2), torch.nan)}, "4 of 4 training embeddings are not finite"),
        ({"test": torch.full((2, 2), torch.inf)}, "2 of 2 test embeddings are not finite"),
        ({"train_labels": torch.zeros(4).long()}, "the 4 labelled training images are of 1 classes"),
        ({"num_classes": 1}, "labels up to 1, but num_classes is 1"),
        ({"test_labels": torch.tensor([-1, -1])}, "no image has a label"),
        ({"test_labels": torch.tensor([0])}, "labels have shape"),
        ({"test_labels": torch.tensor([0, 7])}, "labels up to 7, but scores of only 2"),
    ],
)
def test_wrong_input(probe: Any, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "train": torch.eye(4)[:, :2],
        "train_labels": torch.tensor([0, 1, 0, 1]),
        "test": torch.eye(2),
        "test_labels": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        probe(**(arguments | changes))


def test_wrong_options() -> None:
    for options in ({"strengths": []}, {"strengths": [0.0, 1.0]}, {"validation_share": 1.0}):
        with pytest.raises(ValueError, match="strengths must be positive and validation_share between"):
            linear_probe(*blobs(), **options)  # type: ignore[arg-type]
    for other in ({"neighbours": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="neighbours must be at least 1 and temperature above 0"):
            knn_probe(*blobs(), **other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hold one image a class"):
        linear_probe(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="1 of 2 class scores are not finite"):
        score_classes(torch.tensor([[0.0, 1], [torch.nan, 0]]), torch.tensor([0, 1]))

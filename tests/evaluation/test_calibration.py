"""Calibration: the definition written out bin by bin, and what a perfect and a boastful classifier get."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cmapkd.evaluation.calibration import expected_calibration_error, zero_shot_calibration


def test_ece_is_the_definition_written_out() -> None:
    draws = torch.Generator().manual_seed(0)
    confidence, correct = torch.rand(500, generator=draws), torch.rand(500, generator=draws) < 0.6
    total = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = [i for i in range(500) if low < float(confidence[i]) <= high]
        if inside:
            accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
            mean = sum(float(confidence[i]) for i in inside) / len(inside)
            total += len(inside) / 500 * abs(accuracy - mean)
    assert expected_calibration_error(confidence, correct) == pytest.approx(total, abs=1e-9)


def test_ece_of_the_perfect_and_of_the_boastful() -> None:
    right = torch.arange(100) < 70
    assert expected_calibration_error(torch.full((100,), 0.7), right) == pytest.approx(0, abs=1e-6)
    assert expected_calibration_error(torch.ones(100), right) == pytest.approx(0.3)
    assert expected_calibration_error(torch.zeros(100), right) == pytest.approx(0.7)  # 0 belongs to the first bin


def test_what_is_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match="give probabilities"):
        expected_calibration_error(torch.tensor([1.5]), torch.tensor([True]))
    with pytest.raises(ValueError, match="one confidence and one outcome"):
        expected_calibration_error(torch.tensor([0.5, 0.5]), torch.tensor([True]))


def test_zero_shot_numbers_against_torch() -> None:
    draws = torch.Generator().manual_seed(1)
    images, weights = (F.normalize(torch.randn(n, 8, generator=draws), dim=-1) for n in (40, 5))
    labels = torch.randint(-1, 5, (40,), generator=draws)
    scores = zero_shot_calibration(images, labels, weights, logit_scale=20.0)
    kept = labels >= 0
    logits = 20 * images[kept] @ weights.T
    assert scores["nll"] == pytest.approx(float(F.cross_entropy(logits, labels[kept])), abs=1e-5)
    truth = F.one_hot(labels[kept], 5)
    assert scores["brier"] == pytest.approx(float((logits.softmax(-1) - truth).square().sum(-1).mean()), abs=1e-5)
    assert scores["accuracy"] == pytest.approx(100 * float((logits.argmax(-1) == labels[kept]).float().mean()))
    assert scores["num_images"] == int(kept.sum())
    assert scores["confidence"] == pytest.approx(100 * float(logits.softmax(-1).amax(-1).mean()), abs=1e-4)


def test_the_logit_scale_decides() -> None:
    images, weights = torch.eye(4), torch.eye(4)
    labels = torch.arange(4)
    sure = zero_shot_calibration(images, labels, weights, logit_scale=100.0)
    unsure = zero_shot_calibration(images, labels, weights, logit_scale=1.0)
    assert sure["ece"] == pytest.approx(0, abs=1e-6)
    assert unsure["ece"] == pytest.approx(100 * (1 - math.e / (math.e + 3)), abs=1e-6)
    with pytest.raises(ValueError, match="has a label"):
        zero_shot_calibration(images, torch.full((4,), -1), weights, logit_scale=1.0)

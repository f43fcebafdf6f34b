"""Gradient alignment: its rule written out, on slopes and norms that are given."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from weighting_support import make

from cmapkd.config import ConfigError
from cmapkd.weighting import GradientAlignmentWeighting

ITEMS = ("P2", "P5", "L1", "bank")


def weighting(**settings: object) -> GradientAlignmentWeighting:
    made = make("gradient_alignment", items=ITEMS, **settings)
    assert isinstance(made, GradientAlignmentWeighting)
    return made


def slopes(*values: float) -> dict[str, Tensor]:
    return {item: torch.full((1, 3), value) for item, value in zip(ITEMS, values, strict=True)}


def test_the_rule_written_out() -> None:
    rate, decay, floor = 0.3, 0.5, 0.25
    one = weighting(rate=rate, decay=decay, floor=floor)
    norms, w, mean = [2.0, 0.5, 1.0, 4.0], [1.0] * 4, [0.0] * 4
    one.observe_norms(dict(zip(ITEMS, norms, strict=True)))
    for number, seen in enumerate(([1.0, -0.2, 0.3, 2.0], [0.5, 0.4, -0.3, 1.0], [0.2, 0.1, 0.0, -3.0])):
        one.observe_slopes(slopes(*seen))
        step = max(1 - decay, 1 / (number + 1))
        mean = [m + step * (a - m) for m, a in zip(mean, seen, strict=True)]
        benefit = [m / g for m, g in zip(mean, norms, strict=True)]
        scale = math.sqrt(sum(b * b for b in benefit) / 4)
        w = [x * math.exp(rate * b / scale) for x, b in zip(w, benefit, strict=True)]
        spent = sum(x * g for x, g in zip(w, norms, strict=True))
        w = [x * sum(norms) / spent for x in w]
    found = one.weights_of(ITEMS)
    for item, value in zip(ITEMS, w, strict=True):
        assert found[item] == pytest.approx(floor + (1 - floor) * value, rel=1e-4)
    assert sum(found[item] * g for item, g in zip(ITEMS, norms, strict=True)) == pytest.approx(sum(norms), rel=1e-5)


def test_scale_of_slopes_does_not_matter_and_nothing_learned_is_uniform() -> None:
    one, other, none = weighting(), weighting(), weighting()
    one.observe_slopes(slopes(1.0, 2.0, -1.0, 0.5))
    other.observe_slopes(slopes(100.0, 200.0, -100.0, 50.0))
    none.observe_slopes(slopes(0.0, 0.0, 0.0, 0.0))
    assert one.weights_of(ITEMS) == pytest.approx(other.weights_of(ITEMS))
    assert none.weights_of(ITEMS) == pytest.approx(dict.fromkeys(ITEMS, 1.0))


def test_no_weight_falls_below_the_floor_and_a_fallen_one_comes_back() -> None:
    one = weighting(rate=2.0, decay=0.0)
    for _ in range(20):
        one.observe_slopes(slopes(1.0, -1.0, -1.0, -1.0))
    weights = one.weights_of(ITEMS)
    assert min(weights.values()) == pytest.approx(0.5, abs=1e-2)
    assert weights["P2"] == pytest.approx(0.5 + 0.5 * 4, rel=0.01)
    for _ in range(6):
        one.observe_slopes(slopes(-1.0, 1.0, -1.0, -1.0))
    assert one.weights_of(ITEMS)["P5"] == max(one.weights_of(ITEMS).values())


def test_what_has_no_gradient_or_is_fixed_keeps_weight_one() -> None:
    one = weighting(fixed=("bank",))
    one.observe_norms({"P2": 1.0, "P5": 0.0, "L1": 1.0, "bank": 5.0})
    one.observe_slopes(slopes(1.0, 9.0, -1.0, 9.0))
    weights = one.weights_of(ITEMS)
    assert weights["P5"] == weights["bank"] == 1.0
    assert weights["P2"] > 1 > weights["L1"]
    with pytest.raises(ConfigError, match=r"fixed: unknown item 'bnk' \(did you mean 'bank'"):
        weighting(fixed=("bnk",))


def test_a_stage_shares_out_the_budget_of_its_own_items() -> None:
    one = weighting(floor=0.0)
    one.observe_slopes(slopes(1.0, 0.0, -1.0, 0.5))
    weights = one.weights_of(["P2", "L1"])
    assert {*weights} == {"P2", "L1"}
    assert sum(weights.values()) == pytest.approx(2.0)


def test_norms_are_asked_for_at_first_and_then_now_and_then() -> None:
    one, asked = weighting(norms_every=3), []
    for _ in range(8):
        asked.append(one.wants_norms)
        one.observe_slopes(slopes(1.0, 0.0, 0.0, 0.0))
    assert asked == [True, True, False, True, False, False, True, False]

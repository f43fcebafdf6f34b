"""The bandit: rewards and Exp3.S written out, on held-out losses that are given."""

from __future__ import annotations

import math

import pytest
import torch
from weighting_support import make

from cmapkd.config import ConfigError
from cmapkd.methods import StepInfo
from cmapkd.weighting import BanditWeighting

ITEMS = ("P2", "P5", "L1", "bank")
VECTORS = {"uniform": {}, "early": {"P2": 4.0, "L1": 2.0}, "late": {"P5": 8.0, "P2": 0.0}}


def bandit(**settings: object) -> BanditWeighting:
    made = make("bandit", items=ITEMS, **{"vectors": VECTORS, **settings})
    assert isinstance(made, BanditWeighting)
    return made


def tell(one: BanditWeighting, loss: float, step: int) -> None:
    one.observe_held_out(torch.tensor(loss), generator=StepInfo(step=step, seed=3).generator("bandit"))


def quantile(values: list[float], q: float) -> float:
    ordered, at = sorted(values), q * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def test_rewards_and_exp3s_written_out() -> None:
    rate, explore, share, history = 0.3, 0.25, 0.1, 4
    one = bandit(rate=rate, explore=explore, share=share, history=history)
    told = [5.0, 4.0, 3.8, 3.1, 3.3, 2.0, 1.9, 1.0]
    s, falls, tried = [0.0] * 3, [], []
    for number, loss in enumerate(told):
        if number:
            p = [(1 - explore) * math.exp(x) / sum(map(math.exp, s)) + explore / 3 for x in s]
            falls.append(told[number - 1] - loss)
            low, high = (quantile(falls[-history:], q) for q in (0.2, 0.8))
            reward = min(1.0, max(-1.0, 2 * (falls[-1] - low) / (high - low) - 1)) if high > low else 0.0
            k = int(one.chosen)
            tried.append(k)
            moved = [x + rate * (reward / p[k] if j == k else 0.0) for j, x in enumerate(s)]
            total = sum(map(math.exp, moved))
            s = [math.log((1 - share) * math.exp(x) + share / 2 * (total - math.exp(x))) for x in moved]
        tell(one, loss, number)
        found = one.logits - one.logits[0]  # a constant on all of them is none on the probabilities
        torch.testing.assert_close(found, torch.tensor([x - s[0] for x in s]), rtol=1e-4, atol=1e-5)
    p = [(1 - explore) * math.exp(x) / sum(map(math.exp, s)) + explore / 3 for x in s]
    torch.testing.assert_close(one.probabilities, torch.tensor(p), rtol=1e-4, atol=1e-6)
    assert len({*tried}) > 1


def test_it_comes_to_prefer_the_vector_after_which_the_loss_falls() -> None:
    one, loss = bandit(rate=0.3), 100.0
    tell(one, loss, 0)
    for step in range(1, 60):
        loss -= 1.0 if int(one.chosen) == 1 else 0.2
        tell(one, loss, step)
    assert float(one.probabilities[1]) > 0.6
    for step in range(60, 140):  # and leaves it, once another one is better
        loss -= 1.0 if int(one.chosen) == 2 else 0.2
        tell(one, loss, step)
    assert int(one.probabilities.argmax()) == 2


def test_a_vector_is_put_on_the_budget() -> None:
    one = bandit(fixed=("bank",))
    norms = {"P2": 2.0, "P5": 0.5, "L1": 1.0, "bank": 4.0}
    one.observe_norms(norms)
    one.chosen.fill_(1)
    scale = 3.5 / (4 * 2.0 + 0.5 + 2 * 1.0)
    expected = {"P2": 4 * scale, "P5": scale, "L1": 2 * scale, "bank": 1.0}
    assert one.weights_of(ITEMS) == pytest.approx(expected)
    one.chosen.fill_(2)
    assert one.weights_of(["P2", "P5"]) == pytest.approx({"P2": 0.0, "P5": 5.0})
    with pytest.raises(ValueError, match=r"vector late gives 0 to every active item \(P2\)"):
        one.weights_of(["P2"])


def test_what_it_draws_is_a_function_of_the_step_and_asks_for_its_generator() -> None:
    one, other = bandit(), bandit()
    for each in (one, other):
        drawn = []
        for step in range(12):
            tell(each, 1.0, step)
            drawn.append(int(each.chosen))
        assert {*drawn} == {0, 1, 2}
    assert torch.equal(one.chosen, other.chosen)
    with pytest.raises(ValueError, match="give it a generator"):
        one.observe_held_out(torch.tensor(1.0), generator=None)


def test_a_loss_that_is_no_number_rewards_nothing() -> None:
    one = bandit()
    for step, loss in enumerate((3.0, math.nan, 2.0)):
        tell(one, loss, step)
    assert not one.logits.any()
    assert not one.falls.isfinite().any()


def test_without_names_there_is_a_vector_for_each_item_that_is_not_fixed() -> None:
    one = make("bandit", items=ITEMS, fixed=("bank",), boost=3.0)
    assert isinstance(one, BanditWeighting)
    assert one.vectors == {"uniform": {}, "P2": {"P2": 3.0}, "P5": {"P5": 3.0}, "L1": {"L1": 3.0}}
    assert {*one.log()} == {"probability/uniform", "probability/P2", "probability/P5", "probability/L1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vectors": {"a": {}, "b": {"P22": 2}}}, r"vectors\.b\.P22: unknown item \(did you mean 'P2'\?\)"),
        ({"vectors": {"a": {}, "b": {"P2": 2}}, "fixed": ("P2",)}, r"vectors\.b\.P2: the item is fixed"),
        ({"vectors": {"a": {"P2": 2}}}, r"one vector \(a\) leaves nothing to choose"),
        ({"vectors": {"a": {}, "b": {"P2": -1}}}, r"vectors\.b\.P2: .*>= 0"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bandit(**settings)

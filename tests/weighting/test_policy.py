"""The policy: what a window earns, and that it learns in small worlds where the right answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from weighting_support import DIM, ITEMS, batch, make, step, weigh

from cmapkd.config import ConfigError
from cmapkd.weighting import PolicyWeighting


def kinds(size: int = 8) -> Tensor:
    """Contexts of two kinds, alternating."""
    return torch.randn(2, DIM, generator=torch.Generator().manual_seed(4)).repeat(size // 2, 1)


def play(policy: PolicyWeighting, progress: Any, *, windows: int = 160, noise: float = 0.002) -> Tensor:
    """A held-out loss that falls at each step by 0.01 × progress(weights). Returns the mean policy's weights."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    losses, context = torch.ones(8, 4), kinds()
    level = torch.tensor(5.0)
    for _ in range(policy.config.warmup_steps + windows * policy.config.window):
        policy.observe(level + noise * torch.randn(()))
        level = level - 0.01 * progress(step(policy, losses, context, optimizer))
    policy.eval()
    return weigh(policy, losses, context).weights


def make_policy(**settings: Any) -> PolicyWeighting:
    policy = make("policy", **{"warmup_steps": 20, "window": 4, "edge": 2, **settings})
    assert isinstance(policy, PolicyWeighting)
    return policy


def test_the_policy_finds_the_item_that_makes_the_held_out_loss_fall() -> None:
    weights = play(make_policy(), lambda w: w[:, 2].mean())
    assert bool((weights.argmax(-1) == 2).all())
    assert float(weights[:, 2].mean()) > 2


def test_the_policy_finds_the_right_item_for_each_kind_of_context() -> None:
    weights = play(make_policy(), lambda w: (w[::2, 0].mean() + w[1::2, 3].mean()) / 2, windows=240)
    assert weights.argmax(-1).tolist() == [0, 3] * 4
    assert float(weights[::2, 0].mean()) > 1.5
    assert float(weights[1::2, 3].mean()) > 1.5


def test_cost_moves_the_policy_to_the_cheap_item() -> None:
    costs = {"P2": 0.7, "P3": 0.2, "P4": 0.05, "P5": 0.6}
    free = play(make_policy(costs=costs), lambda w: w[:, 0].mean())
    thrifty = play(make_policy(costs=costs, cost_weight=40.0), lambda w: w[:, 0].mean())
    assert bool((free.argmax(-1) == 0).all())
    assert bool((thrifty.argmax(-1) == 2).all())


def test_the_entropy_bonus_leads_back_to_uniform_where_weights_do_not_matter() -> None:
    policy = make_policy(entropy_weight=1.0)
    with torch.no_grad():
        policy.mean[1, 0] = 5.0
    assert float(play(policy, lambda w: 1.0, windows=0).max()) > 3.5
    assert float(play(policy.train(), lambda w: 1.0, windows=240).max()) < 2.5


# ------------------------------------------------------------------------------------------------ windows, written out


def run(policy: PolicyWeighting, observations: list[float]) -> list[Tensor]:
    used = []
    for value in observations:
        policy.observe(torch.tensor(value))
        used.append(weigh(policy, *batch()).weights)
    return used


def test_an_action_lasts_a_window_and_begins_after_the_warm_up() -> None:
    used = run(make_policy(warmup_steps=5, window=3, edge=1), [1.0] * 15)
    for number in range(6):  # the window under way at step 5 ends uniform
        torch.testing.assert_close(used[number], torch.ones(5, 4))
    for start in (6, 9, 12):
        assert torch.equal(used[start], used[start + 1])
        assert torch.equal(used[start], used[start + 2])
        assert not torch.equal(used[start], used[start - 1])
    assert float(used[6].std(0).max()) > 0.05  # by context


def test_a_window_earns_the_decrease_between_its_own_ends() -> None:
    policy = make_policy(warmup_steps=1, window=3, edge=2, baseline_decay=0.5)
    run(policy, [4.0, 3.0, 2.0, 1.5])  # the last is seen before the first step of the second window
    first = (4.0 + 3.0) / 2 - (2.0 + 1.5) / 2
    assert float(policy.mean_decrease) == pytest.approx(first)
    assert float(policy.advantage) == 0
    run(policy, [1.5, 1.0, 1.0])
    second = (1.5 + 1.5) / 2 - (1.0 + 1.0) / 2
    deviation = second - first
    assert float(policy.mean_decrease) == pytest.approx((first + second) / 2)
    assert float(policy.advantage) == pytest.approx(deviation / (deviation**2 / 2) ** 0.5)
    assert policy.clock.learning == 1


def test_cost_is_that_of_the_weights_used_against_its_mean() -> None:
    costs = {"P2": 1.0, "P3": 2.0, "P4": 3.0, "P5": 6.0}
    policy = make_policy(warmup_steps=1, window=2, edge=1, cost_weight=10.0, costs=costs, baseline_decay=0.5)
    used = run(policy, [1.0, 1.0, 1.0, 1.0, 1.0])
    assert float(policy.mean_cost) == pytest.approx((3.0 + spent(used[2], costs)) / 2, rel=1e-5)
    assert float(policy.advantage) == pytest.approx(-10 * (spent(used[2], costs) - 3.0), rel=1e-4)


def spent(weights: Tensor, costs: dict[str, float]) -> float:
    return sum(float(weights[:, i].mean()) / 4 * costs[item] for i, item in enumerate(ITEMS))


def test_the_gradient_is_the_score_of_the_action_tried_times_its_advantage() -> None:
    policy = make_policy(warmup_steps=1, window=2, edge=1, entropy_weight=0.0, std=0.7)
    run(policy, [3.0, 2.5, 2.0, 2.0, 1.5])
    tried, advantage = policy.tried.clone(), float(policy.advantage)
    assert advantage != 0
    assert bool(tried.any())
    policy.observe(torch.tensor(0.9))
    weigh(policy, *batch()).loss.backward()
    density = torch.distributions.Normal(policy.mean.detach().clone().requires_grad_(), 0.7)
    (score,) = torch.autograd.grad(density.log_prob(tried).sum(), density.loc)
    torch.testing.assert_close(policy.mean.grad, -advantage * 0.7**2 * score / 2)


def test_logits_have_the_stated_variance_for_every_sample() -> None:
    policy = make_policy(std=0.5)
    features = policy._features(batch(50)[1])
    torch.testing.assert_close(features.square().sum(-1), torch.ones(50))
    logits = features @ (0.5 * torch.randn(20_000, 9)).T
    torch.testing.assert_close(logits.std(-1), torch.full((50,), 0.5), rtol=0.05, atol=0)


def test_warm_up_measures_the_context() -> None:
    policy = make_policy(warmup_steps=3, window=2, edge=1)
    contexts = [batch(seed=seed)[1] * 3 + 7 for seed in range(4)]
    for context in contexts:
        policy.observe(torch.tensor(1.0))
        weigh(policy, batch()[0], context)
    seen = torch.cat(contexts)  # the fourth step still belongs to the window that warm-up ended in
    torch.testing.assert_close(policy.context_mean, seen.mean(0))
    torch.testing.assert_close(policy.context_squares / policy.clock.samples, seen.var(0, correction=0))


def test_a_change_of_active_items_breaks_the_window_off() -> None:
    policy = make_policy(warmup_steps=1, window=3, edge=1)
    run(policy, [1.0] * 8)
    closed, before = policy.clock.closed, policy.action.clone()
    policy.observe(torch.tensor(50.0))
    weigh(policy, *batch(), torch.tensor([True, True, False, True]))
    assert policy.clock.closed == closed
    assert (policy.clock.observations, policy.clock.learning, policy.clock.weighed) == (1, 0, 1)
    assert not torch.equal(policy.action, before)


def test_what_is_tried_comes_from_the_generator_alone() -> None:
    actions = []
    for number in range(2):  # two processes, whose own generators differ
        torch.manual_seed(number)
        policy = make_policy(warmup_steps=1, window=2, edge=1)
        for seed in range(4):
            policy.observe(torch.tensor(1.0))
            policy(*batch(), generator=torch.Generator().manual_seed(seed))
        actions.append(policy.action)
    assert bool(actions[0].any())
    assert torch.equal(*actions)
    policy = make_policy(warmup_steps=1, window=2, edge=1)
    for _ in range(2):  # nothing is tried in the first window
        policy.observe(torch.tensor(1.0))
        policy(*batch())
    policy.observe(torch.tensor(1.0))
    with pytest.raises(ValueError, match="a policy draws what it tries: give forward a generator"):
        policy(*batch())


def test_a_policy_that_is_told_nothing_says_so() -> None:
    policy = make_policy(warmup_steps=3)
    for _ in range(3):
        weigh(policy, *batch())
    with pytest.raises(RuntimeError, match="observed no held-out loss in its 3 steps"):
        weigh(policy, *batch())
    with pytest.raises(ValueError, match="give one number"):
        policy.observe(torch.rand(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cost_weight": 1.0}, "costs is empty"),
        ({"costs": {"P2": 1, "P3": 1, "P4": 1}}, "costs.P5: required"),
        ({"costs": {"P2": 1, "P3": 1, "P4": 1, "P5a": 1, "P5": 1}}, r"costs.P5a: unknown item \(did you mean 'P5'"),
    ],
)
def test_costs_must_name_the_items(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(**settings)

"""The gate: the plain one collapses, the regularised one finds its closed-form optimum and stays above its floor."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from weighting_support import DIM, ITEMS, entropy, make, settled, step

from cmapkd.weighting import GateWeighting, entropy_floor

EASY_TO_HARD = (1.0, 0.5, 0.2, 0.1)


def train(gate: torch.nn.Module, losses: Tensor, context: Tensor, *, steps: int = 300, rate: float = 0.01) -> Tensor:
    optimizer = torch.optim.Adam(gate.parameters(), lr=rate)
    for _ in range(steps):
        weights = step(gate, losses, context, optimizer)
    return weights


def two_kinds(size: int = 8) -> Tensor:
    """Contexts of two kinds, alternating."""
    draws = torch.Generator().manual_seed(4)
    kinds = torch.randn(2, DIM, generator=draws).repeat(size // 2, 1)
    return kinds + 0.02 * torch.randn(size, DIM, generator=draws)


def opposite_losses(size: int = 8, scale: float = 1.0) -> Tensor:
    """For one kind of context the first item is easiest, for the other the last; means over the batch are equal."""
    return scale * torch.tensor([EASY_TO_HARD, EASY_TO_HARD[::-1]]).repeat(size // 2, 1)


def test_the_plain_gate_collapses_onto_the_easiest_item_and_the_regularised_one_does_not() -> None:
    losses, context = torch.tensor(EASY_TO_HARD).expand(8, 4), two_kinds()
    plain = train(make("gate", plain=True), losses, context)
    assert float(entropy(plain).max()) < 0.05
    assert bool((plain.argmax(-1) == 3).all())
    kept = train(make("gate"), losses, context)
    assert float(entropy(kept).min()) > entropy_floor(4, 0.5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_where_contexts_differ_the_plain_gate_collapses_for_each_and_the_other_not(scale: float) -> None:
    losses, context = opposite_losses(scale=scale), two_kinds()
    kept = train(make("gate"), losses, context)
    assert float(entropy(kept).min()) > entropy_floor(4, 0.5)
    if scale == 1.0:
        assert float(entropy(train(make("gate", plain=True), losses, context)).max()) < 0.05


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_the_gate_prefers_the_right_item_for_each_context_by_the_closed_form(strength: float) -> None:
    losses, context = opposite_losses(scale=50.0), two_kinds()
    gate = make("gate", strength=strength)
    weights = train(gate, losses, context, steps=400, rate=0.005)
    relative = losses / losses.mean(0)
    spread = relative.amax(-1, keepdim=True) - relative.amin(-1, keepdim=True) + 1e-3
    expected = 4 * (-relative / (strength * spread)).softmax(-1)
    torch.testing.assert_close(weights, expected, rtol=0, atol=0.05)
    assert weights.argmax(-1).tolist() == [3, 0] * 4


def test_items_that_are_small_but_not_falling_are_not_preferred() -> None:
    weights = train(make("gate"), torch.tensor([100.0, 1.0, 0.01, 1e-6]).expand(8, 4), two_kinds(), steps=100)
    torch.testing.assert_close(weights, torch.ones(8, 4), rtol=0, atol=0.01)


@pytest.mark.parametrize("strength", [0.2, 0.5, 2.0])
@pytest.mark.parametrize("num_items", [2, 4, 7])
def test_entropy_floor_is_the_least_over_all_bounded_logits(num_items: int, strength: float) -> None:
    floor = entropy_floor(num_items, strength)
    draws = torch.Generator().manual_seed(0)
    logits = torch.rand(20_000, num_items, generator=draws, dtype=torch.float64) / strength
    assert floor <= float(entropy(logits.softmax(-1)).min()) <= math.log(num_items)
    ends = torch.tensor(list(itertools.product([0.0, 1 / strength], repeat=num_items)), dtype=torch.float64)
    assert floor == pytest.approx(float(entropy(ends.softmax(-1)).min()), abs=1e-12)


def test_running_means_start_as_plain_means_and_skip_inactive_items() -> None:
    gate, context = make("gate", momentum=0.5), torch.zeros(2, DIM)
    active = torch.tensor([True, True, False, True])
    for value in (1.0, 2.0, 4.0):
        gate(torch.full((2, 4), value), context, active)
    assert isinstance(gate, GateWeighting)
    torch.testing.assert_close(gate.running_mean, torch.tensor([2.75, 2.75, 1.0, 2.75]))  # ((1 + 2) / 2 + 4) / 2
    assert gate.num_updates.tolist() == [3, 3, 0, 3]


def test_temperature_stays_in_its_range_and_can_return() -> None:
    gate = make("gate", temperature_range=(0.5, 2.0))
    assert isinstance(gate, GateWeighting)
    assert gate.temperature.item() == pytest.approx(1.0)
    for raw, expected in ((-50.0, 0.5), (50.0, 2.0)):
        with torch.no_grad():
            gate.raw_temperature.fill_(raw)
        assert gate.temperature.item() == expected
    (slope,) = torch.autograd.grad(gate.temperature, gate.raw_temperature)
    assert float(slope) == pytest.approx(1.0)


def test_floor_holds_for_every_weight() -> None:
    losses, context = torch.tensor(EASY_TO_HARD).expand(8, 4), two_kinds()
    weights = train(make("gate", plain=True, floor=0.25), losses, context)
    torch.testing.assert_close(weights[0], torch.tensor([0.25, 0.25, 0.25, 3.25]), rtol=0, atol=0.05)


def test_the_gates_objective_written_out() -> None:
    gate = settled("gate").eval()
    losses, context = opposite_losses(), two_kinds()
    weighted = gate(losses, context)
    p = weighted.weights / 4
    divergence = (p * (4 * p).log()).sum(-1)
    torch.testing.assert_close(weighted.log["gate/divergence"], divergence.mean())
    torch.testing.assert_close(weighted.log["gate/spread"], torch.tensor(0.9 + 1e-3))
    weighted.loss.backward()
    found = gate.output.bias.grad
    logits = (p.log()).requires_grad_()
    q = logits.softmax(-1)
    objective = ((q * losses).sum(-1) + 0.5 * 0.901 * (q * (4 * q).log()).sum(-1)).mean() * len(ITEMS)
    (slope,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(found, (slope / gate.temperature).sum(0).detach(), rtol=1e-3, atol=1e-6)

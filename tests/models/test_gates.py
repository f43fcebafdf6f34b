"""Hard-concrete gates: the published code's numbers, the distribution, gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.models.gates import LOG_ALPHA_RANGE, drawn_gates, expected_weights, fixed_gates, keep_probability

# Numbers of `L0Module` of TinyCLIP's authors; the file names commit and conditions.
PUBLISHED = json.loads((Path(__file__).parents[1] / "methods" / "fixtures" / "tinyclip_masks.json").read_text())
TOWERS = PUBLISHED["towers"]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, tensor(expected), rtol=tolerance, atol=1e-11)


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_probabilities_and_fixed_gates_are_the_published_codes(tower: dict[str, Any]) -> None:
    for kind, values in tower["log_alpha"].items():
        log_alpha = tensor(values)
        close(keep_probability(log_alpha), tower["keep"][kind])
        layers = log_alpha if log_alpha.ndim == 2 else log_alpha[None]
        expected = tower["fixed"][kind] if log_alpha.ndim == 2 else [tower["fixed"][kind]]
        for layer, gates in zip(layers, expected, strict=True):
            close(fixed_gates(layer), gates)


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_drawn_gates_are_the_published_codes(tower: dict[str, Any]) -> None:
    log_alpha = tensor(tower["log_alpha"]["hidden"]).requires_grad_()
    gates = drawn_gates(log_alpha, tensor(tower["drawn"]["uniform"]))
    close(gates, tower["drawn"]["gates"])
    close(torch.autograd.grad(gates.square().sum(), log_alpha)[0], tower["drawn"]["gradient"])


def leaves(tower: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, heads, units = (tensor(tower["log_alpha"][kind]).requires_grad_() for kind in tower["log_alpha"])
    return hidden, heads, units


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_expected_weights_are_the_published_codes(tower: dict[str, Any]) -> None:
    hidden, heads, units = leaves(tower)
    per_head = tower["per_head"] / tower["hidden_size"]  # theirs counts biases, too; ours 4 x the width of a head
    kept = expected_weights(hidden, [*heads], [*units], per_head=per_head)
    assert kept.item() == pytest.approx(tower["kept_parameters"], rel=1e-10)
    for kind, gradient in zip(tower["log_alpha"], torch.autograd.grad(kept, (hidden, heads, units)), strict=True):
        close(gradient, tower["kept_gradients"][kind])


def test_expected_weights_are_a_mean_over_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    channels, heads, units = (torch.randn(size, generator=generator) for size in (6, 3, 5))
    expected = expected_weights(channels, [heads], [units], per_head=8).item()
    draws = []
    for _ in range(4000):
        on = [
            float((drawn_gates(a, torch.rand(len(a), generator=generator)) > 0).sum()) for a in (channels, heads, units)
        ]
        draws.append(on[0] * (8 * on[1] + 2 * on[2]))
    assert sum(draws) / len(draws) == pytest.approx(expected, rel=0.02)


def test_gates_and_their_gradients() -> None:
    log_alpha = torch.linspace(-3, 3, 9, dtype=torch.float64).requires_grad_()
    uniform = torch.full((9,), 0.5, dtype=torch.float64)
    gates = drawn_gates(log_alpha, uniform)
    expected = [min(1, max(0, 1.2 / (1 + math.exp(-1.5 * a)) - 0.1)) for a in log_alpha.tolist()]
    close(gates.detach(), expected)
    assert gates[0] == 0
    assert gates[-1] == 1
    inner = log_alpha.detach()[3:6].requires_grad_()  # at 0 and 1 there is a kink
    assert gradcheck(lambda a: drawn_gates(a, uniform[3:6]), inner)
    assert gradcheck(keep_probability, log_alpha)


def test_as_many_are_off_as_expected_and_never_all() -> None:
    low, high = LOG_ALPHA_RANGE
    half = torch.tensor([low] * 6 + [high] * 6)
    assert (fixed_gates(half) > 0).tolist() == [False] * 6 + [True] * 6
    assert fixed_gates(half)[6:].tolist() == pytest.approx([0.996] * 6, abs=1e-3)
    assert int((fixed_gates(torch.full((5,), low)) > 0).sum()) == 1
    assert int((fixed_gates(torch.full((1,), low)) > 0).sum()) == 1
    before = half.clone()
    fixed_gates(half)
    assert torch.equal(half, before)

"""Bilevel weights: their form written out, and their gradient against finite differences of the whole look-ahead."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from weighting_support import make

from cmapkd.weighting import BilevelWeighting

ITEMS = ("P2", "P5", "L1", "bank")
LEVELS = ITEMS[:3]
NORMS = {"P2": 2.0, "P5": 0.5, "L1": 1.0, "bank": 4.0}


def weighting(*, settled: bool = True, **settings: object) -> BilevelWeighting:
    """In float64, with a network that says something, and running means of 0.5."""
    made = make("bilevel", items=ITEMS, **{"hidden": 3, **settings})
    assert isinstance(made, BilevelWeighting)
    made.double()
    made.observe_norms(NORMS)
    if settled:
        draws = torch.Generator().manual_seed(4)
        for name in made.network:
            part = getattr(made, name)
            part.copy_(torch.randn(part.shape, generator=draws, dtype=part.dtype) / 2)
        made.means.fill_(0.5)
    return made


def losses(seed: int = 1) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    found = {item: torch.rand(5, generator=draws, dtype=torch.float64) * 4 for item in LEVELS}
    return {**found, "bank": torch.rand((), generator=draws, dtype=torch.float64)}


def levels_of(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    return {item: seen[item] for item in LEVELS}


def test_the_network_written_out() -> None:
    one, seen = weighting(reach=1.5), losses()
    found = one.weights_for(seen)
    raw: dict[str, list[float]] = {item: [] for item in ITEMS}
    for b in range(5):
        x = torch.tensor([min(float(seen[item][b]) / 0.5 - 1, 3.0) for item in LEVELS] + [0.0], dtype=torch.float64)
        hidden = F.gelu(one.into @ x + one.into_bias)
        for number, item in enumerate(LEVELS):
            logit = float(one.out[number] @ hidden + one.out_bias[number])
            raw[item].append(math.exp(1.5 * math.tanh(logit)))
    raw["bank"] = [math.exp(1.5 * math.tanh(float(one.out_bias[3])))]
    means = {item: sum(values) / len(values) for item, values in raw.items()}
    scale = sum(NORMS.values()) / sum(NORMS[item] * means[item] for item in ITEMS)
    for item in ITEMS:
        expected = torch.tensor(raw[item], dtype=torch.float64) * scale
        torch.testing.assert_close(found[item].reshape(-1), expected)
    assert float(torch.cat([seen[item] for item in LEVELS]).max()) > 4 * 0.5  # one of them is kept at 3


def toy(theta: Tensor) -> dict[str, Tensor]:
    """Losses of a student of two numbers, as its parameters move; curved, so that the place of a gradient matters."""
    draws = torch.Generator().manual_seed(9)
    targets = torch.randn(3, 5, 2, generator=draws, dtype=torch.float64)
    columns = {item: (theta - target).square().sum(-1) for item, target in zip(LEVELS, targets, strict=True)}
    return {**columns, "bank": (theta.square().sum() + theta[0].sin())}


def held_out(theta: Tensor) -> Tensor:
    return (theta - torch.tensor([0.3, -0.8], dtype=torch.float64)).pow(4).sum() + theta.prod()


def test_the_gradient_is_that_of_finite_differences_through_the_look_ahead_step() -> None:
    one, rate = weighting(fixed=("P5",)), 0.05
    theta = torch.tensor([0.7, 0.2], dtype=torch.float64, requires_grad=True)

    def ahead(network: dict[str, Tensor] | None) -> Tensor:
        columns = toy(theta)
        weights = one.weights_for(columns, network)
        total = sum(((weights[item].detach() * columns[item]).mean() for item in ITEMS), torch.zeros(()))
        return (theta - rate * torch.autograd.grad(total, theta)[0]).detach()

    outer = torch.func.grad(held_out)(ahead(None))
    jacobian = {item: torch.func.jacrev(lambda at, item=item: toy(at)[item])(theta.detach()) for item in ITEMS}
    slopes = {item: each @ outer for item, each in jacobian.items()}
    found = one.gradient_of_network(toy(theta), slopes)
    network = {name: getattr(one, name).clone() for name in one.network}
    step = 1e-6
    for name, part in network.items():
        expected = torch.zeros_like(part)
        for at in range(part.numel()):
            values = []
            for sign in (1, -1):
                moved = part.clone()
                moved.view(-1)[at] += sign * step
                values.append(held_out(ahead({**network, name: moved})))
            expected.view(-1)[at] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(rate * found[name], expected, rtol=1e-5, atol=1e-9, msg=name)
        assert float(expected.abs().max()) > 1e-6, name


def test_it_finds_whose_losses_are_wrong() -> None:
    """P2 of some samples points away from what lowers the held-out loss, and these are harder."""
    one = make("bilevel", items=ITEMS, rate=0.05)
    assert isinstance(one, BilevelWeighting)
    draws = torch.Generator().manual_seed(0)
    for _ in range(60):
        wrong = torch.rand(32, generator=draws) < 0.5
        seen = {item: torch.rand(32, generator=draws) + 0.5 for item in LEVELS} | {"bank": torch.ones(())}
        seen["P2"] = seen["P2"] + wrong
        slopes = {item: torch.full((32,), 0.1) for item in LEVELS} | {"bank": torch.zeros(())}
        slopes["P2"] = torch.where(wrong, -1.0, 1.0)
        one.observe_look_ahead(seen, slopes)
        one.look(levels_of(seen))
    weights = one.weights_for(seen)
    assert float(weights["P2"][~wrong].mean()) > 3 * float(weights["P2"][wrong].mean())
    total = sum(float(each.mean()) for each in weights.values())
    assert total == pytest.approx(4.0, rel=1e-5)  # norms are 1: the budget is kept, and also by what `look` found
    found = [float(one.by_sample[item].mean()) for item in LEVELS] + [one.weights_of(ITEMS)["bank"]]
    assert sum(found) == pytest.approx(4.0, rel=1e-5)


def test_one_step_of_adam() -> None:
    one, seen = weighting(rate=0.1), losses()
    slopes = losses(seed=2)
    slope = one.gradient_of_network(seen, slopes)
    parameters = [getattr(one, name).clone().requires_grad_() for name in one.network]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for _ in range(3):
        for parameter, name in zip(parameters, one.network, strict=True):
            parameter.grad = slope[name]
        optimizer.step()
        one.observe_look_ahead(seen, slopes)
        for parameter, name in zip(parameters, one.network, strict=True):
            torch.testing.assert_close(getattr(one, name), parameter.detach())
        slope = one.gradient_of_network(seen, slopes)


def test_what_is_fixed_or_has_no_gradient_keeps_weight_one() -> None:
    one = weighting(fixed=("bank",))
    one.observe_norms({"P5": 0.0})
    seen = losses()
    weights = one.weights_for(seen)
    one.look(levels_of(seen))
    assert torch.equal(weights["P5"], torch.ones(5, dtype=torch.float64))
    assert {*one.by_sample} == {"P2", "L1"}
    assert one.weights_of(ITEMS)["bank"] == 1.0
    assert float(weights["bank"]) == 1.0
    spent = sum(NORMS[item] * float(weights[item].mean()) for item in ("P2", "L1"))
    assert spent == pytest.approx(3.0)


def test_running_means_follow_in_training_alone() -> None:
    one, seen = weighting(settled=False, decay=0.75), losses()
    one.look(levels_of(seen))
    torch.testing.assert_close(one.means[0], seen["P2"].mean())
    later = losses(seed=3)
    one.look(levels_of(later))
    torch.testing.assert_close(one.means[0], 0.75 * seen["P2"].mean() + 0.25 * later["P2"].mean())
    before = one.means.clone()
    one.eval().look(levels_of(seen))
    assert torch.equal(one.means, before)

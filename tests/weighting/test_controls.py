"""Balancing without held-out pairs, against each formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from weighting_support import batch, make, weigh

from cmapkd.methods import StepInfo


def test_rlw_is_a_softmax_of_normal_numbers_drawn_in_each_step() -> None:
    losses, context = batch()
    weighting = make("rlw")
    first = weighting(losses, context, generator=StepInfo(step=1).generator("a")).weights
    z = torch.randn(4, generator=StepInfo(step=1).generator("a"))
    torch.testing.assert_close(first, (4 * z.softmax(0)).expand(5, 4))
    again = weighting(losses, context, generator=StepInfo(step=2).generator("a")).weights
    assert not torch.equal(first, again)
    assert torch.equal(weighting.eval()(losses, context).weights, torch.ones(5, 4))


def test_dwa_weighs_by_the_ratio_of_the_last_two_windows() -> None:
    weighting = make("dwa", window=2, temperature=0.5)
    values = [torch.rand(3, 4, generator=torch.Generator().manual_seed(n)) for n in range(5)]
    weights = [weigh(weighting, each, torch.zeros(3, 12)).weights[0] for each in values]
    for uniform in weights[:4]:
        torch.testing.assert_close(uniform, torch.ones(4))
    means = [(values[n].mean(0) + values[n + 1].mean(0)) / 2 for n in (0, 2)]
    rates = means[1] / means[0]
    expected = [4 * math.exp(r / 0.5) / sum(math.exp(other / 0.5) for other in rates) for r in rates.tolist()]
    torch.testing.assert_close(weights[4], torch.tensor(expected))


def test_famo_takes_the_papers_weights_and_step() -> None:
    rate, decay = 0.5, 0.1
    weighting = make("famo", rate=rate, decay=decay)
    first, second = (torch.rand(3, 4, generator=torch.Generator().manual_seed(n)) + 0.1 for n in (1, 2))
    one = weigh(weighting, first, torch.zeros(3, 12)).weights[0]
    z = torch.full((4,), 0.25)
    ratios = z / first.mean(0)
    torch.testing.assert_close(one, 4 * ratios / ratios.sum())
    two = weigh(weighting, second, torch.zeros(3, 12)).weights[0]
    xi = torch.zeros(4, requires_grad=True)
    fall = first.mean(0).log() - second.mean(0).log()
    (xi.softmax(0) * fall).sum().backward()  # (∂z/∂ξ)ᵀ (log l(t) - log l(t+1))
    assert xi.grad is not None
    logits = -rate * xi.grad
    torch.testing.assert_close(weighting.logits, logits)
    ratios = logits.softmax(0) / second.mean(0)
    torch.testing.assert_close(two, 4 * ratios / ratios.sum())
    weigh(weighting, second, torch.zeros(3, 12))  # nothing fell: only the decay moves
    torch.testing.assert_close(weighting.logits, logits * (1 - rate * decay))


def test_famos_gradient_is_that_of_the_weighted_logarithms() -> None:
    losses = (batch()[0] + 0.1).requires_grad_()
    weigh(make("famo"), losses, batch()[1]).loss.backward()
    found = losses.grad
    again = losses.detach().clone().requires_grad_()
    means = again.mean(0)
    scale = 4 / (0.25 / means.detach()).sum()
    (scale * (0.25 * means.log()).sum()).backward()
    torch.testing.assert_close(found, again.grad)


def test_small_losses_count_more_in_units_of_their_items_mean() -> None:
    weighting = make("small_loss", temperature=0.5, decay=0.75)
    first, second = (torch.rand(3, 4, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    torch.testing.assert_close(weigh(weighting, first, torch.zeros(3, 12)).weights, torch.ones(3, 4))
    found = weigh(weighting, second, torch.zeros(3, 12)).weights
    means = first.mean(0)
    for b in range(3):
        scores = [math.exp(-float(second[b, i] / (0.5 * means[i]))) for i in range(4)]
        torch.testing.assert_close(found[b], torch.tensor([4 * each / sum(scores) for each in scores]))
    torch.testing.assert_close(weighting.means, 0.75 * means + 0.25 * second.mean(0))


@pytest.mark.parametrize("name", ["famo", "small_loss", "dwa"])
def test_an_item_that_comes_back_begins_anew_or_goes_on(name: str) -> None:
    weighting, some = make(name), torch.tensor([True, False, True, True])
    for active in (None, some, some, None, None):
        weights = weigh(weighting, *batch(), active).weights
        assert bool(weights.isfinite().all())
        torch.testing.assert_close(weights.mean(-1) * 4 / (4 if active is None else 3), torch.ones(5))

"""GradNorm and uncertainty: what they converge to, against closed forms, autograd and the author's own example."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from weighting_support import DIM, ITEMS, make, step

from cmapkd.config import ConfigError
from cmapkd.methods import Method, StageConfig
from cmapkd.weighting import Weighting
from cmapkd.weighting.gradnorm import GradNormWeighting, gradnorm_gradient, gradnorm_targets
from helpers import make_method, random_batch

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "gradnorm.json").read_text())


def gradnorm(**settings: Any) -> GradNormWeighting:
    weighting = make("gradnorm", **{"warmup_steps": 1, "every": 1, **settings})
    assert isinstance(weighting, GradNormWeighting)
    return weighting


def told(weighting: GradNormWeighting, norms: Tensor, losses: Tensor, steps: int = 1) -> Tensor:
    """The weights after so many steps with the same losses and norms."""
    weights = torch.ones(len(losses))
    for _ in range(steps):
        if weighting.wants_gradients:
            weighting.observe_gradients(losses, norms, torch.ones(len(losses), dtype=torch.bool))
        weights = weighting(losses[None], torch.zeros(1, DIM)).weights[0]
    return weights


# ------------------------------------------------------------------------------------------------ gradnorm


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_the_weights_gradient_is_that_of_the_papers_objective_through_the_network(alpha: float) -> None:
    draws = torch.Generator().manual_seed(0)
    shared = torch.randn(5, 3, generator=draws, dtype=torch.float64, requires_grad=True)
    x, heads = (torch.randn(7, 5, generator=draws, dtype=torch.float64) for _ in range(2))
    hidden = (x @ shared).tanh()
    losses = torch.stack([(hidden * (i + 1) + heads[:, :3] * i).square().mean() for i in range(4)])
    weights = torch.rand(4, generator=draws, dtype=torch.float64) + 0.5
    weights.requires_grad_()
    ratios = torch.rand(4, generator=draws, dtype=torch.float64) + 0.1
    # as the paper says it, with gradients of gradients
    norms = torch.stack(
        [
            torch.autograd.grad(w * loss, shared, create_graph=True)[0].norm()
            for w, loss in zip(weights, losses, strict=True)
        ]
    )
    targets = (norms.mean() * (ratios / ratios.mean()) ** alpha).detach()
    (expected,) = torch.autograd.grad((norms - targets).abs().sum(), weights)
    plain = torch.stack([torch.autograd.grad(loss, shared, retain_graph=True)[0].norm() for loss in losses])
    ours = gradnorm_targets(plain, weights.detach(), ratios, alpha=alpha)
    torch.testing.assert_close(ours, targets)
    torch.testing.assert_close(gradnorm_gradient(plain, weights.detach(), ours), expected)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_norms_that_differ_a_thousandfold_are_balanced(alpha: float) -> None:
    norms, losses = torch.tensor([1.0, 1000.0, 0.2, 3.0]), torch.tensor([1.0, 2.0, 0.5, 4.0])
    initial = dict.fromkeys(ITEMS, 2.0)
    weighting = gradnorm(alpha=alpha, initial_losses=initial)
    weights = told(weighting, norms, losses, 40)
    balanced = weights * norms / (losses / losses.mean()) ** alpha
    assert float(balanced.std() / balanced.mean()) < 1e-3
    assert float(weighting.spread) < 1e-3
    assert float(weights.mean()) == pytest.approx(1, rel=1e-5)


def test_descent_takes_the_papers_step_and_stays_positive() -> None:
    norms, losses = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4)
    weights = told(gradnorm(update="descent", rate=0.1), norms, losses, 2)
    expected = torch.ones(4) - 0.1 * torch.tensor([-1.0, -2.0, 3.0, 4.0])
    torch.testing.assert_close(weights, expected * 4 / expected.sum())
    for number in range(1, 20):
        wild = told(gradnorm(update="descent", rate=1.0), norms * 100, losses, number)
        assert bool((wild > 0).all())


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: f"alpha {case['alpha']}")
def test_descent_goes_where_a_published_implementation_goes(case: dict[str, Any]) -> None:
    losses, norms, expected = (torch.tensor(case[key], dtype=torch.float64) for key in ("losses", "norms", "weights"))
    items = [f"task {number}" for number in range(losses.shape[1])]
    initial = dict(zip(items, case["losses"][0], strict=True))
    settings = {"alpha": case["alpha"], "rate": case["rate"], "initial_losses": initial}
    weighting = gradnorm(update="descent", items=items, **settings).double()
    active = torch.ones(len(items), dtype=torch.bool)
    for step_losses, step_norms, weights in zip(losses, norms, expected, strict=True):
        torch.testing.assert_close(weighting.weight, weights, rtol=1e-9, atol=0)
        weighting.observe_gradients(step_losses, step_norms, active)
    assert float((expected[-1] - 1).abs().max()) > 0.02  # they had gone somewhere


def test_initial_losses_are_means_of_the_first_steps_or_given() -> None:
    weighting = gradnorm(warmup_steps=4, initial_losses={"P3": 9.0})
    for number in range(10):
        assert weighting.wants_gradients == (number >= 4)
        weighting(torch.full((1, 4), float(number)), torch.zeros(1, DIM))
    torch.testing.assert_close(weighting.initial, torch.tensor([1.5, 9.0, 1.5, 1.5]))
    every = gradnorm(warmup_steps=3, every=5)
    due = []
    for _ in range(16):
        due.append(every.wants_gradients)
        every(torch.ones(1, 4), torch.zeros(1, DIM))
    assert [number for number, is_due in enumerate(due) if is_due] == [5, 10, 15]


def test_a_term_without_loss_or_stage_keeps_its_weight() -> None:
    weighting = gradnorm(alpha=0.0)
    told(weighting, torch.tensor([1.0, 0.0, 4.0, 2.0]), torch.ones(4), 3)
    assert float(weighting.weight[1]) == pytest.approx(1.0)
    before = weighting.weight.clone()
    weighting.observe_gradients(torch.ones(4), torch.ones(4), torch.tensor([True, True, False, False]))
    assert torch.equal(weighting.weight[2:], before[2:])
    assert float(weighting.weight[:2].mean()) == pytest.approx(float(before[:2].mean()))


def test_gradnorm_goes_on_from_its_state() -> None:
    first, draws = gradnorm(), torch.Generator().manual_seed(0)
    given = [torch.rand(2, 4, generator=draws) + 0.1 for _ in range(12)]
    for norms, losses in given[:7]:
        told(first, norms, losses)
    second = gradnorm()
    second.load_state_dict(load(save(first.state_dict())))
    for norms, losses in given[7:]:
        assert torch.equal(told(first, norms, losses), told(second, norms, losses))


def test_names_that_are_not_weighed_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"initial_losses.P9: unknown item.*known: P2, P3, P4, P5"):
        gradnorm(initial_losses={"P9": 1.0})
    with pytest.raises(ConfigError, match=r"fixed: unknown item 'P9'.*weighed: P2, P3, P4, P5"):
        make("uncertainty", fixed=["P9"])
    with pytest.raises(ConfigError, match=r"must hold 0, where the log variances begin"):
        make("uncertainty", log_variance_range=[1, 2])


def test_levels_have_no_gradients_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"weighting gradnorm balances the gradients of whole terms.*term_weighting"):
        make_method("cmapkd", settings={"weighting": "gradnorm"})


def left_of_the_papers_toy(weighting: Weighting, *, seed: int, scales: tuple[float, ...]) -> float:
    """The sum of the tasks' losses, each over its squared scale, after 400 steps (arXiv:1711.02257, section 4).

    Regressions onto sigma_i tanh((B + eps_i) x) that share a trunk; with equal weights the one of large scale is all
    that the trunk hears.
    """
    draws = torch.Generator().manual_seed(seed)
    shared = 10 * torch.randn(50, 20, generator=draws)
    maps = [shared + 3.5 * torch.randn(50, 20, generator=draws) for _ in scales]
    torch.manual_seed(seed)
    last = torch.nn.Linear(40, 40)
    trunk = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.ReLU(), last, torch.nn.ReLU())
    heads = torch.nn.ModuleList(torch.nn.Linear(40, 20) for _ in scales)
    optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=2e-3)

    def losses(size: int) -> Tensor:
        x = torch.randn(size, 50, generator=draws) / math.sqrt(50)
        found = [
            head(trunk(x)) - sigma * (x @ each).tanh() for head, sigma, each in zip(heads, scales, maps, strict=True)
        ]
        return torch.stack([each.square().mean() for each in found])

    for _ in range(400):
        each = losses(64)
        if isinstance(weighting, GradNormWeighting) and weighting.wants_gradients:
            norms = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in each]
            weighting.observe_gradients(each.detach(), torch.stack(norms), torch.ones(len(scales), dtype=torch.bool))
        optimizer.zero_grad()
        weighting(each[None], torch.zeros(1, DIM)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((losses(2000) / torch.tensor(scales).square()).sum())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_papers_toy_ends_lower_than_with_equal_weights(seed: int) -> None:
    scales, items = (1.0, 100.0), ["small", "large"]
    equal = left_of_the_papers_toy(make("uniform", items=items), seed=seed, scales=scales)
    balanced = left_of_the_papers_toy(gradnorm(alpha=0.12, items=items), seed=seed, scales=scales)
    assert balanced < equal - 0.08  # 1.39 to 1.45 and 1.23 to 1.28 in the three


# ------------------------------------------------------------------------------------------------ in a method


def weighted(name: str = "clip_kd", **settings: Any) -> Method:
    weighting = {"name": "gradnorm", "warmup_steps": 1, "every": 1, "rate": 1.0, "alpha": 0.0}
    return make_method(name, settings={"term_weighting": weighting, **settings}).train()


def test_shared_layers_are_below_everything_that_is_read() -> None:
    assert [*weighted().shared_parameters()] == ["vision.project.weight", "text.project.weight"]
    levels = weighted("cmapkd", language_levels={"L4": 1.0})
    assert [*levels.shared_parameters()] == ["vision.blocks.0.shrink.weight", "text.project.weight"]


def test_shared_layers_learn_and_a_borrowed_text_tower_has_none() -> None:
    joined = make_method("vl2v_adip", settings={"term_weighting": {"name": "gradnorm"}})
    align, distil = joined.default_stages
    for stage, layer in ((align, "project.weight"), (distil, "image.vision.project.weight")):
        joined.enter(stage)
        shared = joined.shared_parameters()
        assert [*shared] == [layer]
        assert shared[layer].requires_grad


def test_where_nothing_of_the_student_learns_nothing_is_shared() -> None:
    method = weighted()
    method.enter(StageConfig(name="maps", share=1.0, train=("modules",)))
    assert not method.shared_parameters()
    for _ in range(3):
        method(random_batch(6))["weighted"].value.backward()


def test_norms_are_those_of_each_terms_gradient_at_the_shared_layers() -> None:
    method, batch = weighted(), random_batch(6)
    shared = [*method.shared_parameters().values()]
    plain = make_method("clip_kd")
    expected = []
    for term in plain.terms(batch).values():
        layers = (
            plain.student.get_parameter("vision.project.weight"),
            plain.student.get_parameter("text.project.weight"),
        )
        found = torch.autograd.grad(term.weight * term.value, layers, retain_graph=True)
        expected.append(torch.cat([gradient.flatten() for gradient in found]).norm())
    method(batch)  # the first step only counts
    terms = method(batch)
    found = torch.stack([method.measurements[f"terms/gradient_norm/{name}"] for name in method.term_names])
    torch.testing.assert_close(found, torch.stack(expected))  # weighted, by the weights of before: 1
    weights = torch.stack([method.measurements[f"terms/weight/{name}"] for name in method.term_names])
    inverse = 1 / torch.stack(expected)
    torch.testing.assert_close(weights, inverse * 4 / inverse.sum())
    terms["weighted"].value.backward()
    assert all(weight.grad is not None for weight in shared)  # measuring leaves no trace, and the graph whole


def test_measuring_leaves_the_students_gradients_alone() -> None:
    method, other = weighted(), make_method("clip_kd", settings={"term_weighting": "uniform"}).train()
    batch = random_batch(6)
    method(batch)
    assert method.weighting_of_terms is not None
    method.weighting_of_terms.config = method.weighting_of_terms.config.model_copy(update={"rate": 1e-12})
    for each in (method, other):
        each(batch)["weighted"].value.backward()
    theirs = dict(other.named_parameters())
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad)


def test_a_term_that_does_not_reach_the_shared_layers_is_refused() -> None:
    method = weighted()
    method(random_batch(4))
    method.shared_parameters = lambda: {"interactive_scale": method.interactive_scale}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"term contrastive has no gradient at interactive_scale"):
        method(random_batch(4))


# ------------------------------------------------------------------------------------------------ uncertainty


def test_uncertainty_finds_the_noise_of_the_authors_example() -> None:
    """Two regressions with noise of deviation 10 and 1: the learned deviations are those, within a tenth."""
    draws = torch.Generator().manual_seed(0)
    weighting = make("uncertainty", items=("wide", "narrow"))
    optimizer = torch.optim.AdamW(weighting.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    for number in range(600):
        if number == 400:
            optimizer.param_groups[0].update(lr=1e-4)
        noise = torch.randn(256, 2, generator=draws) * torch.tensor([10.0, 1.0])
        step(weighting, noise.square(), torch.zeros(256, DIM), optimizer)
    found = (weighting.log_variance.detach() / 2).exp()
    torch.testing.assert_close(found, torch.tensor([10.0, 1.0]), rtol=0.1, atol=0)


def test_uncertainty_is_fast_enough_for_a_short_run_and_bounded() -> None:
    weighting = make("uncertainty")
    values = torch.tensor([1.0, 1000.0, 0.0, 1e9])
    optimizer = torch.optim.AdamW(weighting.parameters(), lr=1e-3, betas=(0.9, 0.98))  # as a run's
    for _ in range(300):
        weights = step(weighting, values.expand(3, 4), torch.zeros(3, DIM), optimizer)
    s = weighting.log_variance.detach()
    assert float(s[1]) == pytest.approx(math.log(1000), abs=0.3)
    assert float(s[2]) == pytest.approx(-5, abs=0.1)
    assert float(s[3]) == pytest.approx(10, abs=0.1)
    assert float(weights[0, 0] / weights[0, 1]) == pytest.approx(1000, rel=0.35)


def test_a_fixed_item_keeps_weight_one() -> None:
    weighting = make("uncertainty", fixed=["P3"])
    with torch.no_grad():
        weighting.scaled += torch.tensor([1.0, 5.0, -2.0, 0.5]) / 50
    weights = weighting(torch.rand(3, 4), torch.zeros(3, DIM)).weights[0]
    expected = torch.tensor([-1.0, 2.0, -0.5]).softmax(0) * 3
    torch.testing.assert_close(weights, torch.stack([expected[0], torch.tensor(1.0), expected[1], expected[2]]))
    alone = weighting(torch.rand(3, 4), torch.zeros(3, DIM), torch.tensor([False, True, False, False]))
    assert alone.weights[0].tolist() == [0.0, 1.0, 0.0, 0.0]
    alone.loss.backward()
    assert not weighting.scaled.grad.any()
    levels = make_method("cmapkd", settings={"weighting": {"name": "uncertainty", "fixed": ["P5"]}})
    assert {n for n, _ in levels.named_parameters() if n.startswith("weighting")} == {
        "weighting.visual.scaled",
        "weighting.language.scaled",
    }

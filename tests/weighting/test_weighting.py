"""What every weighting keeps to, and the three that need no context."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Any, Literal

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from pydantic import SerializeAsAny, field_validator
from safetensors.torch import load, save
from torch import Tensor
from weighting_support import DIM, ITEMS, SETTINGS, batch, make, settled, step, weigh

from cmapkd.config import Config, ConfigError
from cmapkd.weighting import (
    WEIGHTINGS,
    AttentionConfig,
    AttentionWeighting,
    Weighting,
    WeightingConfig,
    make_weighting,
    weighting_config,
)
from helpers import make_method

PER_SAMPLE = ["gate", "attention", "policy"]
LEARNING = ["uncertainty", "gate", "attention", "policy"]


# ------------------------------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_not_negative_and_have_mean_one(name: str) -> None:
    weighted = settled(name)(*batch())
    assert not weighted.weights.requires_grad
    assert bool((weighted.weights >= 0).all())
    torch.testing.assert_close(weighted.weights.mean(-1), torch.ones(5))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_loss_is_the_batch_mean_of_weighted_sums_written_out(name: str) -> None:
    losses, context = batch()
    weighted = settled(name)(losses, context)
    rows = zip(weighted.weights.tolist(), losses.tolist(), strict=True)
    expected = sum(w * x for row, values in rows for w, x in zip(row, values, strict=True)) / 5
    assert weighted.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_weight_weighs_its_own_sample(name: str, plain: bool) -> None:
    losses, context = batch()
    losses.requires_grad_()
    weighted = settled(name, **({"plain": plain} if name in ("gate", "attention") else {}))(losses, context)
    weighted.loss.backward()
    assert losses.grad is not None
    torch.testing.assert_close(losses.grad, weighted.weights / 5)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_weights_differ_between_samples_and_whose_they_are_matters(name: str) -> None:
    losses, context = batch()
    weighted = settled(name)(losses, context)
    assert float(weighted.weights.std(0).max()) > 0.05
    shuffled = (weighted.weights.roll(1, 0) * losses).sum(-1).mean()
    assert abs((shuffled - weighted.loss).item()) > 1e-3


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_only_the_losses_and_its_own_parameters_get_a_gradient(name: str) -> None:
    source, context = torch.rand(5, 4, requires_grad=True), batch()[1].requires_grad_()
    weighting = settled(name)
    weighted = weigh(weighting, source * 2, context)
    weighted.loss.backward()
    assert context.grad is None
    torch.testing.assert_close(source.grad, weighted.weights * 2 / 5)
    assert all(parameter.grad is not None for parameter in weighting.parameters())
    assert bool(list(weighting.parameters())) == (name in LEARNING)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_log_names_what_is_read_by_a_person(name: str) -> None:
    weighted = settled(name)(*batch())
    for number, item in enumerate(ITEMS):
        torch.testing.assert_close(weighted.log[f"weight/{item}"], weighted.weights[:, number].mean())
    p = weighted.weights / 4
    torch.testing.assert_close(weighted.log["entropy"], -(p * (p + 1e-30).log()).sum(-1).mean())
    assert all(value.shape == () and not value.requires_grad for value in weighted.log.values())


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_everything_but_manual_starts_uniform(name: str) -> None:
    losses, context = batch()
    if name == "famo":  # its logits do; at equal losses so do its weights
        losses = losses[:, :1].expand(5, 4)
    weighted = make(name, **({"weights": dict.fromkeys(ITEMS, 7.0)} if name == "manual" else {}))(losses, context)
    torch.testing.assert_close(weighted.weights, torch.ones(5, 4))
    torch.testing.assert_close(weighted.loss, losses.sum(-1).mean())


# ------------------------------------------------------------------------------------------------ inactive items


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("plain", [False, True])
def test_inactive_items_count_nothing_and_the_others_have_mean_one(name: str, plain: bool) -> None:
    weighting = settled(name, **({"plain": plain} if name in ("gate", "attention") else {}))
    losses, context = batch()
    losses[:, 1] = torch.nan  # never read
    losses.requires_grad_()
    weighted = weigh(weighting, losses, context, torch.tensor([True, False, True, True]))
    weighted.loss.backward()
    assert bool(weighted.loss.isfinite())
    assert losses.grad is not None
    torch.testing.assert_close(weighted.weights[:, [0, 2, 3]].mean(-1), torch.ones(5))
    assert not weighted.weights[:, 1].any()
    assert not losses.grad[:, 1].any()
    assert all(bool(p.grad.isfinite().all()) for p in weighting.parameters() if p.grad is not None)
    assert float(weighted.log["entropy"]) <= math.log(3) + 1e-6


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_one_active_item_has_weight_one(name: str) -> None:
    weighting = settled(name)
    weighted = weigh(weighting, *batch(), torch.tensor([False, False, False, True]))
    weighted.loss.backward() if name in LEARNING else None
    torch.testing.assert_close(weighted.weights, torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(5, 4))
    assert all(bool(p.grad.isfinite().all()) for p in weighting.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------ precision, state


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_half_precision_and_autocast_do_not_coarsen(name: str) -> None:
    losses, context = batch(32)
    losses, context = losses.bfloat16(), context.bfloat16()
    weighting = settled(name).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = weigh(weighting, losses, context)
    expected = weigh(weighting, losses.float(), context.float())
    assert inside.loss.dtype == inside.weights.dtype == torch.float32
    torch.testing.assert_close(inside.loss, expected.loss, rtol=0, atol=0)
    torch.testing.assert_close(inside.weights, expected.weights, rtol=0, atol=0)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_float64_losses_stay_float64(name: str) -> None:
    losses, context = batch()
    weighted = settled(name).eval()(losses.double(), context.double())
    assert weighted.loss.dtype == torch.float64
    torch.testing.assert_close(weighted.loss.float(), settled(name).eval()(losses, context).loss)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_run_goes_on_from_its_state_bit_identically(name: str) -> None:
    first = settled(name)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1) if name in LEARNING else None
    stored, random = load(save(first.state_dict())) if first.state_dict() else {}, torch.get_rng_state()
    assert all(value.dtype in (torch.float32, torch.int64) for value in stored.values())

    def go_on(weighting: Weighting, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
        used = []
        for number in range(9):
            losses, context = batch(seed=100 + number)
            weighting.observe(losses.mean())
            if optimizer is not None:
                used.append(step(weighting, losses, context, optimizer))
            else:
                used.append(weigh(weighting, losses, context).weights)
        return used

    expected = go_on(first, optimizer)
    second = make(name, seed=99)
    second.load_state_dict(stored)
    torch.set_rng_state(random)
    found = go_on(second, torch.optim.SGD(second.parameters(), lr=0.1) if name in LEARNING else None)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    if name == "policy":
        assert not torch.equal(found[0], found[-1])  # a new action was drawn on the way


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_evaluating_changes_nothing(name: str) -> None:
    weighting = settled(name).eval()
    before, random = copy.deepcopy(weighting.state_dict()), torch.get_rng_state()
    weighting.observe(torch.tensor(3.0))
    weigh(weighting, *batch(), torch.tensor([True, False, True, True]))
    after = weighting.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(torch.get_rng_state(), random)


# ------------------------------------------------------------------------------------------------ uniform, manual


def test_uniform_is_exactly_the_mean_of_sums() -> None:
    losses, context = batch()
    assert torch.equal(make("uniform")(losses, context).loss, losses.sum(-1).mean())


def test_manual_weights_are_the_numbers_scaled_to_mean_one() -> None:
    losses, context = batch()
    expected = torch.tensor([0.5, 1.0, 0.0, 3.0]) * 4 / 4.5
    torch.testing.assert_close(make("manual")(losses, context).weights[3], expected)
    some = make("manual")(losses, context, torch.tensor([True, True, False, False])).weights[0]
    torch.testing.assert_close(some, torch.tensor([2 / 3, 4 / 3, 0.0, 0.0]))


def test_manual_refuses_to_lose_the_loss() -> None:
    with pytest.raises(ValueError, match=r"gives 0 to every active item \(P4\)"):
        make("manual")(*batch(), torch.tensor([False, False, True, False]))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"P2": 1, "P3": 1, "P4": 1, "P55": 1}, r"weights.P55: unknown item \(did you mean 'P5'\?\)"),
        ({"P2": 1, "P3": 1, "P4": 1, "P55": 1}, "weights.P5: required, but not given"),
        ({"P2": -1, "P3": 1, "P4": 1, "P5": 1}, "weights.P2: .*>= 0"),
        (dict.fromkeys(ITEMS, 0), "every weight is zero"),
    ],
)
def test_manual_numbers_must_name_the_items(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("manual", weights=weights)


# ------------------------------------------------------------------------------------------------ uncertainty


def test_uncertainty_finds_the_logarithm_of_each_loss() -> None:
    weighting = make("uncertainty")
    values = torch.tensor([1.0, 0.5, 0.2, 4.0])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.5 / 50**2)  # the gradient too is of the scaled parameter
    for _ in range(100):
        weights = step(weighting, values.expand(3, 4), torch.zeros(3, DIM), optimizer)
    torch.testing.assert_close(weighting.log_variance.detach(), values.log(), rtol=0, atol=1e-4)
    torch.testing.assert_close(weights[0], (1 / values) * 4 / (1 / values).sum(), rtol=1e-3, atol=0)


def test_uncertainty_gradient_is_the_papers() -> None:
    weighting = settled("uncertainty")
    with torch.no_grad():
        weighting.scaled.mul_(0.01)
    losses, context = batch()
    weigh(weighting, losses, context).loss.backward()
    s = weighting.log_variance.detach().clone().requires_grad_()
    ((-s).exp() * losses.mean(0) / 2 + s / 2).sum().backward()
    torch.testing.assert_close(weighting.scaled.grad, 50 * s.grad)


# ------------------------------------------------------------------------------------------------ refusals, configs


@pytest.mark.parametrize(
    ("losses", "context", "active", "message"),
    [
        ((4,), (5, DIM), None, "not means over the batch"),
        ((5, 3), (5, DIM), None, r"losses has shape \(5, 3\)"),
        ((5, 4), (4, DIM), None, r"context has shape \(4, 12\), expected \(5, 12\)"),
        ((5, 4), (5, DIM), torch.ones(4), "one bool for each of P2"),
        ((5, 4), (5, DIM), torch.ones(3).bool(), "one bool for each of P2"),
        ((5, 4), (5, DIM), torch.zeros(4).bool(), "switches every item off"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(losses: Any, context: Any, active: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("uniform")(torch.rand(losses), torch.rand(context), active)


@pytest.mark.parametrize(("items", "dim"), [((), 3), (("P2", "P2"), 3), (("P2",), 0)])
def test_items_must_have_names_of_their_own(items: tuple[str, ...], dim: int) -> None:
    with pytest.raises(ValueError, match="items of different names"):
        make_weighting(weighting_config("uniform"), items=items, context_dim=dim)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_settings_are_described_and_name_their_weighting(name: str) -> None:
    config = weighting_config({"name": name, **SETTINGS[name]})
    assert type(config) is WEIGHTINGS[name].Config
    assert all(field.description for field in type(config).model_fields.values())
    assert weighting_config(config) is config
    assert weighting_config(config.model_dump(mode="json")) == config
    assert (WEIGHTINGS[name].__doc__ or "").strip()
    if name != "manual":
        assert weighting_config(name) == WEIGHTINGS[name].Config()


class Recipe(Config):
    weighting: SerializeAsAny[WeightingConfig]

    @field_validator("weighting", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return weighting_config(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("polcy", r"weighting: unknown weighting 'polcy' \(did you mean 'policy'\?\); known: uniform, manual"),
        ({"name": "gate", "strenth": 1}, r"weighting.strenth: unknown key \(did you mean 'strength'\?\)"),
        ({"name": "gate", "strength": 0}, "weighting.strength: .*> 0"),
        ({"name": "gate", "temperature": 9}, r"temperature 9.0 must lie in temperature_range \[0.25, 4.0\]"),
        ({"name": "gate", "floor": 1.5}, "weighting.floor: .*<= 1"),
        ({"name": "policy", "window": 6, "edge": 4}, "edge 4 is too long for window 6.*at most 3"),
        ({"name": "manual"}, "weighting.weights: required"),
        ({"strength": 1}, "a name or a mapping with `name`"),
        (3, "a name or a mapping with `name`"),
    ],
)
def test_config_typos_are_named(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_mapping({"weighting": value})


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_signatures_hold_the_shapes_that_are_passed(name: str) -> None:
    weighting = settled(name)
    checked = jaxtyped(typechecker=beartype)(Weighting.forward)
    losses, context = batch()
    assert checked(weighting, losses, context, torch.ones(4).bool()).loss.shape == ()
    jaxtyped(typechecker=beartype)(type(weighting).observe)(weighting, losses.mean())


# ------------------------------------------------------------------------------------------------ of other packages


class TheirsConfig(WeightingConfig):
    name: Literal["theirs"] = "theirs"


class TheirWeighting(AttentionWeighting):
    """A weighting of another package that looks at levels."""

    Config = TheirsConfig

    def __init__(self, _config: TheirsConfig, *, items: Sequence[str], widths: Sequence[int]) -> None:
        super().__init__(AttentionConfig(), items=items, widths=widths)


def test_a_weighting_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", f"{__name__}:TheirWeighting", "cmapkd.weightings")
    strange = EntryPoint("strange", "json:dumps", "cmapkd.weightings")
    monkeypatch.setitem(WEIGHTINGS.__dict__, "_offered", {"theirs": point, "strange": strange})
    monkeypatch.setattr(WEIGHTINGS, "_loaded", {})
    assert [*WEIGHTINGS][-2:] == ["theirs", "strange"]
    config = weighting_config("theirs")
    weighting = make_weighting(config, items=("P2", "P5"), context_dim=3, level_widths=(4, 8))
    assert isinstance(weighting, TheirWeighting)
    assert weighting(torch.rand(2, 2), torch.randn(2, 12)).weights.shape == (2, 2)
    method = make_method("cmapkd", settings={"weighting": {"name": "theirs"}})
    assert type(method.get_submodule("weighting.visual")) is TheirWeighting
    with pytest.raises(ConfigError, match=r"which is no subclass of cmapkd\.weighting\.base\.Weighting"):
        weighting_config("strange")

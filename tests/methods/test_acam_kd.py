"""ACAM-KD: its masks and terms written out, what learns from what, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmapkd.features.cooperative_masks import CooperativeMasks, of_largest_one, share_of
from cmapkd.features.pyramid import level_grid
from cmapkd.methods.acam_kd import AcamConfig, AcamKD
from cmapkd.models import LevelRequest
from cmapkd.objectives import mask_overlap, masked_error
from helpers import make_method, random_batch

TERMS = ("contrastive", "channel", "spatial", "diversity")


def made(**settings: Any) -> AcamKD:
    method = make_method("acam_kd", settings=settings)
    assert isinstance(method, AcamKD)
    return method


def cells(method: AcamKD) -> tuple[Tensor, Tensor]:
    """The levels of both models for `random_batch(3)` on the student's 2 x 2 grid."""
    batch, needs = random_batch(3), LevelRequest(("blocks.0",))
    assert method.teacher is not None
    ours = method.student(batch.inputs["student"], needs).image.levels["blocks.0"]
    theirs = method.teacher.model(batch.inputs["teacher"], needs).image.levels["blocks.0"]
    return level_grid(ours).detach(), level_grid(theirs, (2, 2)).detach()


@torch.no_grad()
@pytest.mark.parametrize("standardised", [True, False])
def test_terms_are_their_formulas_written_out(standardised: bool) -> None:
    method = made(num_masks=2, standardise=standardised)
    ours, theirs = cells(method)
    assert method.adapt is not None
    assert method.masks is not None
    ours = method.adapt(ours)
    if standardised:
        ours, theirs = (F.layer_norm(x, x.shape[-1:], eps=1e-6) for x in (ours, theirs))
    parts, sums = method.masks, dict.fromkeys(TERMS[1:], 0.0)
    for f_s, f_t in zip(ours, theirs, strict=True):
        scores = (f_t @ parts.query.weight.T) @ (f_s @ parts.key.weight.T).T / math.sqrt(len(parts.query.weight))
        fused = scores.softmax(-1) @ (f_s @ parts.value.weight.T)
        m_c = torch.stack([torch.sigmoid(unit * fused.mean(0)) for unit in parts.channel_units[:, 0]])
        m_s = torch.stack([torch.sigmoid(fused @ unit) for unit in parts.spatial_units])
        squares = (f_s - f_t) ** 2
        for name, masks, errors in (("channel", m_c, squares.mean(0)), ("spatial", m_s, squares.mean(1))):
            sums[name] += sum(float((m * errors).sum() / m.sum()) for m in masks) / 2 / 3
            sums["diversity"] += float(torch.cosine_similarity(masks[0], masks[1], dim=0)) / 3
    terms = method.terms(random_batch(3))
    assert {name: term.weight for name, term in terms.items()} == dict.fromkeys(TERMS, 1.0)
    for name, expected in sums.items():
        assert terms[name].value.item() == pytest.approx(expected, rel=1e-5), name


def test_without_masks_both_errors_are_the_plain_one() -> None:
    method = made(masks="none")
    terms = method.terms(random_batch(3))
    assert method.term_names == tuple(terms) == TERMS[:3]
    ours, theirs = cells(method)
    assert method.adapt is not None
    ours, theirs = (F.layer_norm(x, x.shape[-1:], eps=1e-6) for x in (method.adapt(ours), theirs))
    for name in ("channel", "spatial"):
        torch.testing.assert_close(terms[name].value, F.mse_loss(ours, theirs))


def test_masks_of_the_teacher_are_its_mean_squares() -> None:
    method = made(masks="teacher", standardise=False)
    ours, theirs = cells(method)
    assert method.adapt is not None
    squares = (method.adapt(ours) - theirs) ** 2
    terms, energy = method.terms(random_batch(3)), theirs**2
    weights = energy.mean(2) / energy.mean(2).sum(1, keepdim=True)
    torch.testing.assert_close(terms["spatial"].value, (weights * squares.mean(2)).sum(1).mean())
    weights = energy.mean(1) / energy.mean(1).sum(1, keepdim=True)
    torch.testing.assert_close(terms["channel"].value, (weights * squares.mean(1)).sum(1).mean())
    assert method.masks is None


@pytest.mark.parametrize(("gradient", "learns"), [("both", True), ("diversity", False)])
def test_what_the_masks_learn_from(gradient: str, learns: bool) -> None:
    method = made(mask_gradient=gradient)
    terms = method.terms(random_batch(4))
    assert method.masks is not None
    units = method.masks.spatial_units
    (by_error,) = torch.autograd.grad(terms["spatial"].value, units, retain_graph=True, allow_unused=True)
    (by_overlap,) = torch.autograd.grad(terms["diversity"].value, units)
    assert (by_error is not None) == learns
    assert float(by_overlap.abs().max()) > 0


def test_printed_masks_vanish_and_divided_ones_weigh_on() -> None:
    """The printed terms are lowest without masks. Large steps on tokens of two models that do not change."""
    draws = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(4, 6, 8, generator=draws) for _ in range(2))
    errors = (ours - theirs).square().mean(2)
    found = {}
    for divided in (True, False):
        torch.manual_seed(0)
        masks = CooperativeMasks(8, 3)
        optimizer = torch.optim.Adam(masks.parameters(), lr=0.03)
        for _ in range(60):
            logits = masks(ours, theirs)[1]
            mask = of_largest_one(logits) if divided else logits.sigmoid()
            weighed = masked_error(errors, mask, divided=divided).mean()
            (weighed + mask_overlap(mask, of_one_length=divided).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[divided] = float(weighed.detach() / errors.mean())
    assert found[False] < 0.1
    assert 0.3 < found[True] < 1  # below 1: masks learn to leave large errors


def test_sizes_of_masks_are_logged() -> None:
    method = made()
    method(random_batch(4))
    kinds = ("channel", "spatial")
    assert set(method.measurements) == {
        f"masks/{k}{what}" for k in kinds for what in ("", "_least", "_share", "_error")
    }
    assert all(0 < float(value) < 1.2 for value in method.measurements.values())


def test_divided_terms_do_not_see_how_small_a_mask_is() -> None:
    """Also where its sigmoids are zeros in float32."""
    logits = torch.tensor([[[-1.0, 0.0, 2.0]]]) - 40
    small, smaller = of_largest_one(logits), of_largest_one(logits - 100)
    torch.testing.assert_close(small, smaller)
    assert small.amax() == 1
    torch.testing.assert_close(of_largest_one(logits + 40), (logits + 40).sigmoid() / torch.tensor(2.0).sigmoid())
    assert share_of(torch.ones(1, 2, 5)).tolist() == [[1, 1]]
    assert share_of(torch.eye(5)[None]).tolist()[0] == pytest.approx([0.2] * 5)


def test_weights_of_zero_and_settings_that_make_no_sense() -> None:
    method = made(channel_weight=0, spatial_weight=0, diversity_weight=0)
    assert method.teacher_detail == "global"
    assert set(method(random_batch(3))) == {"contrastive"}
    assert not [name for name, _ in method.named_parameters() if not name.startswith("student.")]
    assert made().teacher_detail == "dense"
    with pytest.raises(ValueError, match="no mask would learn: give diversity_weight a number above 0"):
        AcamConfig(name="acam_kd", mask_gradient="diversity", diversity_weight=0)
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        AcamConfig(name="acam_kd", num_masks=1)

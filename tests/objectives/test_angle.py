"""Angles by chords against arccos, and the dispersion that a teacher's answers have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from cmapkd.methods.dispersion import SMALLEST, Dispersion
from cmapkd.objectives import angular_dispersion, squared_angle


def pair(angle: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two rows of length 2 and 3 that stand at an angle."""
    turned = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    return (2 * turned).to(dtype), torch.tensor([[3.0, 0.0]], dtype=dtype)


@pytest.mark.parametrize("angle", [1e-5, 1e-3, 0.031, 0.033, 1.0, math.pi / 2, 3.0, math.pi - 1e-4])
def test_it_is_the_angle_in_both_precisions(angle: float) -> None:
    assert squared_angle(*pair(angle)).item() == pytest.approx(angle**2, rel=1e-9)
    # arccos of a float32 cosine finds 0 at 1e-5, and 0.00098 or 0 at 1e-3
    assert squared_angle(*pair(angle, torch.float32)).item() == pytest.approx(angle**2, rel=2e-5, abs=1e-14)


def test_value_and_gradient_are_those_of_arccos() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    found = []
    for form in (squared_angle, lambda s, t: nn.functional.cosine_similarity(s, t).acos().square()):
        leaf = student.clone().requires_grad_()
        value = form(leaf, teacher)
        value.sum().backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    near = teacher + 1e-2 * student  # on both sides of where the series begins
    assert gradcheck(lambda s: squared_angle(s, teacher), near.requires_grad_())


def test_agreement_and_opposition_have_finite_gradients() -> None:
    teacher = torch.randn(3, 4)
    for sign, value in ((1.0, 0.0), (-1.0, math.pi**2)):
        student = (sign * 2 * teacher).requires_grad_()
        angles = squared_angle(student, teacher)
        assert angles.detach() == pytest.approx(torch.full((3,), value), abs=1e-5)
        angles.sum().backward()
        assert student.grad.isfinite().all()
    teacher = teacher.requires_grad_()
    assert not squared_angle(teacher, teacher).sum().isnan()
    with pytest.raises(ValueError, match="student embedding has shape"):
        squared_angle(torch.zeros(2, 3), torch.zeros(2, 4))


def written_out(rows: Tensor) -> float:
    units = [row / row.norm() for row in rows]
    mean = sum(units) / len(units)
    return sum(math.acos(float(unit @ mean / mean.norm())) ** 2 for unit in units) / len(units)


def test_the_dispersion_is_its_definition_and_has_no_scale() -> None:
    torch.manual_seed(1)
    rows = torch.randn(7, 5, dtype=torch.float64) + 1
    assert angular_dispersion(rows).item() == pytest.approx(written_out(rows), rel=1e-10)
    lengths = torch.arange(1.0, 8.0)[:, None]
    torch.testing.assert_close(angular_dispersion(lengths * rows), angular_dispersion(rows))
    assert angular_dispersion(rows[:1].expand(4, 5)).item() == pytest.approx(0.0, abs=1e-12)


def test_a_run_finds_nearly_what_a_pass_finds() -> None:
    """Batches are compared with the mean direction so far; `fill` has all of them at once."""
    torch.manual_seed(2)
    rows = torch.randn(40 * 32, 16, dtype=torch.float64) + 0.7
    noted, filled = Dispersion(16).double(), Dispersion(16).double()
    assert noted.value.item() == pytest.approx(SMALLEST)
    for batch in rows.split(32):
        noted.note(3 * batch, batches=100)
    filled.fill(rows.split(100))
    assert filled.value.item() == pytest.approx(written_out(rows), rel=1e-9)
    assert noted.value.item() == pytest.approx(filled.value.item(), rel=5e-3)
    torch.testing.assert_close(noted.total, filled.total)
    first = Dispersion(16).double()
    first.note(rows[:32], batches=100)
    assert first.value.item() == pytest.approx(written_out(rows[:32]), rel=1e-9)

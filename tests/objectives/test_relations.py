"""Relational objectives against their definitions in plain loops, their gradients and what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.objectives import layer_relation_distance, relation_distance

BATCH, LEVELS, WIDTH, TEACHER_WIDTH = 5, 3, 4, 6
ORDER = torch.tensor([3, 0, 4, 2, 1])
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "samples": (relation_distance, (BATCH,)),
    "layers": (layer_relation_distance, (BATCH, LEVELS)),
}


def tensors(name: str) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(*LOSSES[name][1], width, generator=draws, dtype=torch.float64) for width in (WIDTH, TEACHER_WIDTH)
    )
    return student, teacher


def rotation(width: int) -> Tensor:
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.linalg.qr(matrix)[0]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def gram(rows: Tensor) -> list[list[float]]:
    return [[cosine(a, b) for b in rows] for a in rows]


def squares(student: list[float], teacher: list[float]) -> float:
    return sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True))


def test_relation_distance_is_the_gram_matrices_difference_written_out() -> None:
    student, teacher = tensors("samples")
    rows = [squares(s, t) / BATCH for s, t in zip(gram(student), gram(teacher), strict=True)]
    values = relation_distance(student, teacher)
    assert values.tolist() == pytest.approx(rows, rel=1e-12)
    assert float(values.mean()) == pytest.approx(sum(rows) * BATCH / BATCH**2, rel=1e-12)


def test_layer_relation_distance_is_each_samples_own_matrix_written_out() -> None:
    student, teacher = tensors("layers")
    for i, value in enumerate(layer_relation_distance(student, teacher)):
        expected = sum(squares(s, t) for s, t in zip(gram(student[i]), gram(teacher[i]), strict=True)) / LEVELS**2
        assert float(value) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name: str) -> None:
    student, teacher = tensors(name)
    assert gradcheck(lambda s: LOSSES[name][0](s, teacher), [student.requires_grad_()])


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    student, teacher = (x.requires_grad_() for x in tensors(name))
    LOSSES[name][0](student, teacher).sum().backward()
    assert student.grad is not None
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_lengths_and_rotations_of_either_space_do_not_matter(name: str) -> None:
    loss, (student, teacher) = LOSSES[name][0], tensors(name)
    lengths = 10 ** (4 * torch.rand(LOSSES[name][1], generator=torch.Generator().manual_seed(1)).double() - 2)
    values = loss(student, teacher)
    torch.testing.assert_close(loss(student * lengths[..., None], teacher / lengths[..., None]), values)
    torch.testing.assert_close(loss(student @ rotation(WIDTH), teacher @ rotation(TEACHER_WIDTH)), values)


@pytest.mark.parametrize("name", LOSSES)
def test_an_order_of_samples_becomes_the_order_of_values(name: str) -> None:
    loss, (student, teacher) = LOSSES[name][0], tensors(name)
    values = loss(student, teacher)
    torch.testing.assert_close(loss(student[ORDER], teacher[ORDER]), values[ORDER])
    assert not torch.isclose(loss(student[ORDER], teacher), values).any()


def test_only_order_of_levels_common_to_both_models_does_not_matter() -> None:
    student, teacher = tensors("layers")
    values = layer_relation_distance(student, teacher)
    torch.testing.assert_close(layer_relation_distance(student.flip(1), teacher.flip(1)), values)
    assert not torch.isclose(layer_relation_distance(student.roll(1, 1), teacher), values).any()


@pytest.mark.parametrize("name", LOSSES)
def test_zero_at_agreement(name: str) -> None:
    student, _ = tensors(name)
    same_cosines = torch.cat([2 * student, torch.zeros_like(student)], -1)
    values = LOSSES[name][0](student, same_cosines)
    torch.testing.assert_close(values, torch.zeros_like(values))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_float32_values(name: str, dtype: torch.dtype) -> None:
    loss, (student, teacher) = LOSSES[name][0], (x.to(dtype) for x in tensors(name))
    values = loss(student, teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, loss(student.float(), teacher.float()))
    torch.testing.assert_close(values, loss(student.double(), teacher.double()).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_coarsen_a_loss(name: str) -> None:
    loss, (student, teacher) = LOSSES[name][0], (x.float() for x in tensors(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(student, teacher)
    torch.testing.assert_close(inside, loss(student, teacher), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_samples_that_do_not_pair_up_are_refused(name: str) -> None:
    student, teacher = tensors(name)
    with pytest.raises(ValueError, match=r"\(4, .*\(5, "):
        LOSSES[name][0](student[:4], teacher)


def test_levels_that_do_not_pair_up_are_refused() -> None:
    student, teacher = tensors("layers")
    with pytest.raises(ValueError, match=r"\(5, 2, 4\) .*\(5, 3, 6\)"):
        layer_relation_distance(student[:, :2], teacher)
    with pytest.raises(ValueError, match=r"\[batch, levels, dim\]"):
        layer_relation_distance(student[:, 0], teacher[:, 0])
    with pytest.raises(ValueError, match="one row for each pair"):
        relation_distance(student, teacher)


@pytest.mark.parametrize("name", LOSSES)
def test_signatures_hold_the_shapes_that_are_passed(name: str) -> None:
    checked = jaxtyped(typechecker=beartype)(LOSSES[name][0])
    assert checked(*tensors(name)).shape == (BATCH,)

"""Objectives over a bank of teacher embeddings: definitions in plain loops, gradients, promises, chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd import objectives
from cmapkd.objectives import bank_divergence, bank_relation_distance

BATCH, ENTRIES, WIDTH = 4, 11, 5
ORDER = torch.tensor([3, 0, 2, 1])
# nothing; one entry; everything; a whole chunk of three and more
EXCLUDE = torch.tensor([[False] * 11, [False] * 10 + [True], [True] * 11, [True] * 7 + [False] * 4])

FP16 = 5e-3  # of each sample's loss and gradient, at most, where the bank's numbers are fp16

Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "divergence": lambda *x, exclude=None: bank_divergence(*x, student_scale=7.0, teacher_scale=5.0, exclude=exclude),
    "chunked divergence": lambda *x, exclude=None: bank_divergence(
        *x, student_scale=7.0, teacher_scale=5.0, exclude=exclude, chunk=3
    ),
    "relation": bank_relation_distance,
}


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and bank."""
    draws = torch.Generator().manual_seed(0)
    student, teacher, bank = (
        torch.randn(rows, WIDTH, generator=draws, dtype=torch.float64) for rows in (BATCH, BATCH, ENTRIES)
    )
    return student, teacher, bank


def rotation(width: int) -> Tensor:
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.linalg.qr(matrix)[0]


# ------------------------------------------------------------------------------------------------ definitions


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


@pytest.mark.parametrize("exclude", [None, EXCLUDE])
@pytest.mark.parametrize("chunk", [None, 1, 3, 11, 100])
def test_bank_divergence_is_the_sum_over_entries_written_out(exclude: Tensor | None, chunk: int | None) -> None:
    student, teacher, bank = tensors()
    values = bank_divergence(student, teacher, bank, student_scale=7.0, teacher_scale=5.0, exclude=exclude, chunk=chunk)
    for i in range(BATCH):
        kept = [n for n in range(ENTRIES) if exclude is None or not exclude[i, n]]
        q, p = (
            [math.exp(scale * cosine(x[i], bank[n])) for n in kept] for x, scale in ((student, 7.0), (teacher, 5.0))
        )
        expected = sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        assert float(values[i]) == pytest.approx(expected, rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("exclude", [None, EXCLUDE])
def test_bank_relation_distance_is_the_mean_over_entries_written_out(exclude: Tensor | None) -> None:
    student, teacher, bank = tensors()
    for i, value in enumerate(bank_relation_distance(student, teacher, bank, exclude=exclude)):
        kept = [n for n in range(ENTRIES) if exclude is None or not exclude[i, n]]
        squares = [(cosine(student[i], bank[n]) - cosine(teacher[i], bank[n])) ** 2 for n in kept]
        assert float(value) == pytest.approx(sum(squares) / max(1, len(kept)), rel=1e-12)


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_frozen_bank_is_used_as_it_is(chunk: int | None) -> None:
    student, teacher, bank = tensors()
    found = []
    for entries, frozen in ((bank, False), (torch.nn.functional.normalize(bank, dim=-1), True)):
        anchors = student.clone().requires_grad_()
        values = bank_divergence(
            anchors, teacher, entries, student_scale=7.0, teacher_scale=5.0, exclude=EXCLUDE, frozen=frozen, chunk=chunk
        )
        values.square().sum().backward()
        found.append((values.detach(), anchors.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_the_student_scale_learns() -> None:
    student, teacher, bank = tensors()

    def of_scale(scale: Tensor) -> Tensor:
        return bank_divergence(student, teacher, bank, student_scale=scale, teacher_scale=5.0, exclude=EXCLUDE)

    assert gradcheck(of_scale, torch.tensor(7.0, dtype=torch.float64, requires_grad=True))


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("exclude", [None, EXCLUDE])
def test_gradient(name: str, exclude: Tensor | None) -> None:
    student, teacher, bank = tensors()
    assert gradcheck(lambda s: LOSSES[name](s, teacher, bank, exclude=exclude), [student.requires_grad_()])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")  # torch, of itself
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("exclude", [None, EXCLUDE])
def test_forward_derivative(name: str, exclude: Tensor | None) -> None:
    student, teacher, bank = tensors()
    of_student = [student.requires_grad_()]
    assert gradcheck(lambda s: LOSSES[name](s, teacher, bank, exclude=exclude), of_student, check_forward_ad=True)


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_second_derivative_is_refused_and_not_wrong(chunk: int | None) -> None:
    """The gradient from above is a constant, which torch's `once_differentiable` takes for nothing to be missed."""
    student, teacher, bank = tensors()
    student.requires_grad_()
    loss = bank_divergence(student, teacher, bank, student_scale=7.0, teacher_scale=5.0, chunk=chunk).sum()
    (plain,) = torch.autograd.grad(loss, student, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    assert torch.equal(gradient, plain)
    with pytest.raises(RuntimeError, match="written out and was to be differentiated again"):
        torch.autograd.grad(gradient.square().sum(), student, allow_unused=True)


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradient_of_the_students_scale(chunk: int | None) -> None:
    student, teacher, bank = tensors()
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda s: bank_divergence(student, teacher, bank, student_scale=s, teacher_scale=3.0, chunk=chunk), [scale]
    )


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_teacher_or_the_bank(name: str) -> None:
    student, teacher, bank = (x.requires_grad_() for x in tensors())
    LOSSES[name](student, teacher, bank).sum().backward()
    assert student.grad is not None
    assert student.grad.any()
    assert teacher.grad is None
    assert bank.grad is None


@pytest.mark.parametrize("chunk", [None, 3])
def test_no_gradient_reaches_the_teachers_scale(chunk: int | None) -> None:
    student, teacher, bank = (x.requires_grad_() for x in tensors())
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    bank_divergence(student, teacher, bank, student_scale=1.0, teacher_scale=scale, chunk=chunk).sum().backward()
    assert scale.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_without_entries_gives_zero_and_no_gradient(name: str) -> None:
    student, teacher, bank = tensors()
    values = LOSSES[name](student.requires_grad_(), teacher, bank, exclude=EXCLUDE)
    values.sum().backward()
    assert student.grad is not None
    assert values[2] == 0
    assert student.grad.any(1).tolist() == [True, True, False, True]


# ------------------------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize("exclude", [None, EXCLUDE])
@pytest.mark.parametrize("chunk", [1, 3, 5, 10])
def test_chunked_equals_whole_in_value_and_gradient(exclude: Tensor | None, chunk: int) -> None:
    student, teacher, bank = tensors()
    scale = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)
    weights = torch.arange(1.0, BATCH + 1)
    results = []
    for size in (None, chunk):
        values = bank_divergence(
            student.requires_grad_(),
            teacher,
            bank,
            student_scale=scale,
            teacher_scale=100.0,
            exclude=exclude,
            chunk=size,
        )
        results.append((values, *torch.autograd.grad((values * weights).sum(), [student, scale])))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_chunks_keep_no_logits_for_the_backward_pass() -> None:
    def kept(chunk: int | None) -> set[tuple[int, ...]]:
        shapes: set[tuple[int, ...]] = set()

        def pack(x: Tensor) -> Tensor:
            shapes.add(tuple(x.shape))
            return x

        student, teacher, bank = tensors()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            bank_divergence(student.requires_grad_(), teacher, bank, student_scale=7.0, teacher_scale=5.0, chunk=chunk)
        return shapes

    assert (BATCH, ENTRIES) in kept(None)
    assert not {(BATCH, ENTRIES), (BATCH, 3), (BATCH, 2)} & kept(3)


@pytest.mark.parametrize("name", LOSSES)
def test_the_bank_may_be_refilled_before_the_backward_pass(name: str) -> None:
    student, teacher, bank = tensors()
    student.requires_grad_()
    (expected,) = torch.autograd.grad(LOSSES[name](student, teacher, bank).sum(), student)
    values = LOSSES[name](student, teacher, bank)
    bank.zero_()
    torch.testing.assert_close(torch.autograd.grad(values.sum(), student)[0], expected)


# ------------------------------------------------------------------------------------------------ invariants


@pytest.mark.parametrize("name", LOSSES)
def test_lengths_and_a_rotation_of_the_common_space_do_not_matter(name: str) -> None:
    loss, inputs = LOSSES[name], tensors()
    draws = torch.Generator().manual_seed(1)
    scaled = [x * 10 ** (4 * torch.rand(len(x), 1, generator=draws).double() - 2) for x in inputs]
    torch.testing.assert_close(loss(*scaled), loss(*inputs))
    torch.testing.assert_close(loss(*(x @ rotation(WIDTH) for x in inputs)), loss(*inputs))


@pytest.mark.parametrize("name", LOSSES)
def test_an_order_of_samples_becomes_the_order_of_values_and_that_of_entries_does_not_matter(name: str) -> None:
    loss, (student, teacher, bank) = LOSSES[name], tensors()
    values = loss(student, teacher, bank, exclude=EXCLUDE)
    torch.testing.assert_close(loss(student[ORDER], teacher[ORDER], bank, exclude=EXCLUDE[ORDER]), values[ORDER])
    torch.testing.assert_close(loss(student, teacher, bank.flip(0), exclude=EXCLUDE.flip(1)), values)
    assert not torch.isclose(loss(student.roll(1, 0), teacher, bank), loss(student, teacher, bank)).any()


@pytest.mark.parametrize("name", LOSSES)
def test_excluded_entries_are_as_if_they_were_not_there(name: str) -> None:
    loss, (student, teacher, bank) = LOSSES[name], tensors()
    expected = loss(student, teacher, bank[7:])
    torch.testing.assert_close(loss(student, teacher, bank, exclude=EXCLUDE[3].expand(BATCH, -1)), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_value_does_not_depend_on_the_batch(name: str) -> None:
    loss, (student, teacher, bank) = LOSSES[name], tensors()
    torch.testing.assert_close(loss(student[1:2], teacher[1:2], bank), loss(student, teacher, bank)[1:2])


def test_zero_at_agreement() -> None:
    student, _, bank = tensors()
    zeros = torch.zeros(BATCH, dtype=torch.float64)
    for chunk in (None, 3):
        values = bank_divergence(student, 3 * student, bank, student_scale=9.0, teacher_scale=9.0, chunk=chunk)
        torch.testing.assert_close(values, zeros)
    torch.testing.assert_close(bank_relation_distance(student, 3 * student, bank), zeros)


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_float32_values(name: str, dtype: torch.dtype) -> None:
    loss, inputs = LOSSES[name], [x.to(dtype) for x in tensors()]
    values = loss(*inputs, exclude=EXCLUDE)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, loss(*(x.float() for x in inputs), exclude=EXCLUDE))
    expected = loss(*(x.double() for x in inputs), exclude=EXCLUDE).float()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_coarsen_a_loss_or_its_gradient(name: str) -> None:
    student, teacher, bank = (x.float() for x in tensors())
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LOSSES[name](student, teacher, bank)
    outside = LOSSES[name](student, teacher, bank)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    gradients = [torch.autograd.grad(values.sum(), student)[0] for values in (inside, outside)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def of_bank(student: Tensor, teacher: Tensor, bank: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Values, and the student's gradient."""
    values = bank_divergence(student, teacher, bank, frozen=True, **options)
    return values.detach(), torch.autograd.grad((values * torch.arange(1, len(values) + 1)).sum(), student)[0]


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("widened", [2**19, 2 * WIDTH])
def test_a_bank_in_half_precision_is_its_widened_copy(
    chunk: int | None, widened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmapkd.objectives.bank._WIDENED", widened)
    student, teacher, bank = tensors()
    student.requires_grad_()
    half = torch.nn.functional.normalize(bank, dim=-1).half()
    options = {"student_scale": 7.0, "teacher_scale": 5.0, "exclude": EXCLUDE, "chunk": chunk}
    found, expected = (of_bank(student, teacher, each, **options) for each in (half, half.double()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_what_half_precision_of_the_bank_does_to_the_loss() -> None:
    """At a width and a scale of real teachers, for a student that is far off and for one that is near."""
    draws = torch.Generator().manual_seed(0)
    teacher, bank, noise = (torch.randn(rows, 768, generator=draws) for rows in (8, 1024, 8))
    bank[:64] += teacher.repeat(8, 1) / 2  # some entries that a softmax at this scale is about
    bank = torch.nn.functional.normalize(bank, dim=-1)
    for distance in (1.0, 0.1):
        student = (teacher + distance * noise).requires_grad_()
        exact, half = (
            of_bank(student, teacher, x, student_scale=100.0, teacher_scale=100.0) for x in (bank, bank.half())
        )
        assert float((half[0] / exact[0] - 1).abs().max()) < FP16
        assert float((half[1] - exact[1]).norm() / exact[1].norm()) < FP16


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_do_not_fit_are_refused_with_both(name: str) -> None:
    loss, (student, teacher, bank) = LOSSES[name], tensors()
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(4, 5\)"):
        loss(student[:3], teacher, bank)
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 5\).*project the student"):
        loss(student[:, :3], teacher, bank)
    with pytest.raises(ValueError, match=r"\(11, 3\).*\(4, 5\)"):
        loss(student, teacher, bank[:, :3])
    with pytest.raises(ValueError, match=r"\(0, 5\).*at least one entry"):
        loss(student, teacher, bank[:0])
    with pytest.raises(ValueError, match=r"\(4, 10\).*shape \(4, 11\)"):
        loss(student, teacher, bank, exclude=EXCLUDE[:, :10])
    with pytest.raises(ValueError, match="int64"):
        loss(student, teacher, bank, exclude=EXCLUDE.long())


@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_holds_at_least_one_entry(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"got {chunk}"):
        bank_divergence(*tensors(), student_scale=1.0, teacher_scale=1.0, chunk=chunk)


@pytest.mark.parametrize("name", ["bank_divergence", "bank_relation_distance"])
def test_signatures_hold_the_shapes_that_are_passed(name: str) -> None:
    checked = jaxtyped(typechecker=beartype)(getattr(objectives, name))
    settings = {"student_scale": torch.tensor(2.0), "teacher_scale": 3.0, "chunk": 4}
    values = checked(*tensors(), exclude=EXCLUDE, **(settings if name == "bank_divergence" else {}))
    assert values.shape == (BATCH,)

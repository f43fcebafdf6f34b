"""Objectives over the levels of a pyramid, against their definitions in plain loops, gradients and promises."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd import objectives
from cmapkd.objectives import (
    embedding_distance,
    feature_distance,
    hint_distance,
    level_distance,
    prior_coupling,
    pyramid_divergence,
    similarity_divergence,
)

BATCH, TOKENS, WIDTH, TEACHER_WIDTH = 4, 5, 6, 7
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
COUPLING = torch.tensor([[0.5, 0.0], [2.0, 0.0], [0.0, 1.5]], dtype=torch.float64)
SCALES = torch.tensor([[3.0, 1.0], [7.0, 2.0], [4.0, 5.0]], dtype=torch.float64)
ORDER = torch.tensor([3, 0, 2, 1])


def pyramid(x: list[Tensor]) -> Tensor:
    return pyramid_divergence(*x, coupling=COUPLING, student_scale=SCALES, teacher_scale=5.0)


# name: (per-sample loss of a list of tensors, shapes of the student's tensors and then as many of the teacher's,
# where the batch stands)
LOSSES: dict[str, tuple[Callable[[list[Tensor]], Tensor], list[tuple[int, ...]], int]] = {
    "level": (lambda x: level_distance(*x), [(BATCH, TOKENS, WIDTH)] * 2, 0),
    "masked level": (lambda x: level_distance(*x, MASK), [(BATCH, TOKENS, WIDTH)] * 2, 0),
    "hint": (lambda x: hint_distance(*x), [(BATCH, TOKENS, WIDTH)] * 2, 0),
    "masked hint": (lambda x: hint_distance(*x, MASK), [(BATCH, TOKENS, WIDTH)] * 2, 0),
    "embedding": (lambda x: embedding_distance(*x), [(BATCH, WIDTH)] * 2, 0),
    "pyramid": (
        pyramid,
        [(3, BATCH, WIDTH), (2, BATCH, WIDTH), (3, BATCH, TEACHER_WIDTH), (2, BATCH, TEACHER_WIDTH)],
        1,
    ),
}


def tensors(name: str, *, seed: int = 0) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in LOSSES[name][1]]


def rotation(width: int) -> Tensor:
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.linalg.qr(matrix)[0]


# ------------------------------------------------------------------------------------------------ definitions


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def standardised(token: list[float]) -> list[float]:
    mean = sum(token) / len(token)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in token) / len(token))
    return [(x - mean) / deviation for x in token]


def divergence(student: list[float], teacher: list[float]) -> float:
    q, p = [[math.exp(score) for score in scores] for scores in (student, teacher)]
    return sum(x / sum(p) * math.log(x / sum(p) / (y / sum(q))) for x, y in zip(p, q, strict=True))


@pytest.mark.parametrize("mask", [None, MASK])
def test_level_distance_is_the_mean_over_real_tokens_and_channels_written_out(mask: Tensor | None) -> None:
    student, teacher = tensors("level")
    for i, value in enumerate(level_distance(student, teacher, mask)):
        squares = [
            (s - t) ** 2
            for n in range(TOKENS)
            if mask is None or mask[i, n]
            for s, t in zip(standardised(student[i, n].tolist()), standardised(teacher[i, n].tolist()), strict=True)
        ]
        assert float(value) == pytest.approx(sum(squares) / max(1, len(squares)), rel=1e-10)


@pytest.mark.parametrize("mask", [None, MASK])
def test_hint_distance_is_the_mean_of_squares_as_they_are_written_out(mask: Tensor | None) -> None:
    student, teacher = tensors("level")
    for i, value in enumerate(hint_distance(student, teacher, mask)):
        squares = [
            (s - t) ** 2
            for n in range(TOKENS)
            if mask is None or mask[i, n]
            for s, t in zip(student[i, n].tolist(), teacher[i, n].tolist(), strict=True)
        ]
        assert float(value) == pytest.approx(sum(squares) / max(1, len(squares)), rel=1e-12)


def test_embedding_distance_is_two_minus_two_cosines_and_feature_distance_its_mean() -> None:
    student, teacher = tensors("embedding")
    values = embedding_distance(student, teacher)
    expected = [2 - 2 * cosine(s, t) for s, t in zip(student, teacher, strict=True)]
    assert values.tolist() == pytest.approx(expected, rel=1e-12)
    assert float(feature_distance(student, teacher)) == pytest.approx(sum(expected) / BATCH, rel=1e-12)


def test_pyramid_divergence_is_the_two_divergences_of_every_pair_written_out() -> None:
    s_visual, s_language, t_visual, t_language = tensors("pyramid")
    values = pyramid(tensors("pyramid"))
    for b in range(BATCH):
        for i in range(3):
            for j in range(2):
                by_image = [
                    [scale * cosine(visual[i, b], language[j, c]) for c in range(BATCH)]
                    for visual, language, scale in (
                        (s_visual, s_language, float(SCALES[i, j])),
                        (t_visual, t_language, 5.0),
                    )
                ]
                by_text = [
                    [scale * cosine(visual[i, c], language[j, b]) for c in range(BATCH)]
                    for visual, language, scale in (
                        (s_visual, s_language, float(SCALES[i, j])),
                        (t_visual, t_language, 5.0),
                    )
                ]
                expected = float(COUPLING[i, j]) * (divergence(*by_image) + divergence(*by_text)) / 2
                assert float(values[b, i, j]) == pytest.approx(expected, rel=1e-9)


def test_the_global_pair_alone_is_similarity_divergence_in_value_and_gradient() -> None:
    s_visual, s_language, t_visual, t_language = tensors("pyramid")
    student = [s_visual.requires_grad_(), s_language.requires_grad_()]
    coupling = torch.zeros(3, 2)
    coupling[2, 1] = 1
    ours = pyramid_divergence(
        *student, t_visual, t_language, coupling=coupling, student_scale=7.0, teacher_scale=torch.tensor(5.0)
    )
    ours = ours.sum((1, 2)).mean()
    theirs = similarity_divergence(
        student[0][2], student[1][1], t_visual[2], t_language[1], student_scale=7.0, teacher_scale=5.0
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student))


def test_the_prior_couples_levels_of_like_granularity() -> None:
    prior = prior_coupling()
    partners = {"P2": {"L1"}, "P3": {"L1", "L2"}, "P4": {"L2", "L3"}, "P5": {"L3", "L4"}}
    for i, visual in enumerate(("P2", "P3", "P4", "P5")):
        for j, language in enumerate(("L1", "L2", "L3", "L4")):
            expected = 1 / len(partners[visual]) if language in partners[visual] else 0
            assert float(prior[i, j]) == expected
    assert prior.sum() == 4


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name: str) -> None:
    loss, inputs = LOSSES[name][0], tensors(name)
    count = len(inputs) // 2
    assert gradcheck(lambda *x: loss([*x, *inputs[count:]]), [x.requires_grad_() for x in inputs[:count]])


def test_gradient_of_coupling_and_scales() -> None:
    coupling, scales = COUPLING.clone().requires_grad_(), SCALES.clone().requires_grad_()

    def loss(scales: Tensor) -> Tensor:
        return pyramid_divergence(*tensors("pyramid"), coupling=COUPLING, student_scale=scales, teacher_scale=5.0)

    assert gradcheck(loss, [scales])
    assert gradcheck(loss, [torch.tensor(3.0, dtype=torch.float64, requires_grad=True)])
    values = pyramid_divergence(*tensors("pyramid"), coupling=coupling, student_scale=scales, teacher_scale=scales)
    values.sum().backward()
    raw = pyramid_divergence(
        *tensors("pyramid"), coupling=(COUPLING > 0).double(), student_scale=SCALES, teacher_scale=SCALES
    )
    torch.testing.assert_close(coupling.grad, raw.sum(0))  # and zero where there is no coupling


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    loss, inputs = LOSSES[name][0], [x.requires_grad_() for x in tensors(name)]
    loss(inputs).sum().backward()
    count = len(inputs) // 2
    assert all(x.grad is not None and bool(x.grad.any()) for x in inputs[:count])
    assert all(x.grad is None for x in inputs[count:])


def test_no_gradient_reaches_the_teachers_scale() -> None:
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    inputs = [x.requires_grad_() for x in tensors("pyramid")]
    pyramid_divergence(*inputs, coupling=COUPLING, student_scale=1.0, teacher_scale=scale).sum().backward()
    assert scale.grad is None


def test_a_value_per_sample_lets_a_weight_choose_its_sample() -> None:
    for name in ("level", "embedding"):
        student, teacher = tensors(name)
        values = LOSSES[name][0]([student.requires_grad_(), teacher])
        (values * torch.tensor([0.0, 1.0, 0.0, 0.0])).sum().backward()
        assert student.grad is not None
        assert student.grad.flatten(1).any(1).tolist() == [False, True, False, False]


# ------------------------------------------------------------------------------------------------ invariants


@pytest.mark.parametrize("name", [name for name in LOSSES if "hint" not in name])
def test_a_positive_scaling_of_any_vector_does_not_matter(name: str) -> None:
    loss, inputs = LOSSES[name][0], tensors(name)
    draws = torch.Generator().manual_seed(1)
    scaled = [x * 10 ** (4 * torch.rand(x.shape[:-1], generator=draws)[..., None].double() - 2) for x in inputs]
    torch.testing.assert_close(loss(scaled), loss(inputs))


@pytest.mark.parametrize("name", LOSSES)
def test_an_order_of_samples_becomes_the_order_of_values(name: str) -> None:
    loss, _, place = LOSSES[name]
    inputs = tensors(name)
    masked = {"masked level": level_distance, "masked hint": hint_distance}.get(name)
    if masked is not None:
        torch.testing.assert_close(masked(inputs[0][ORDER], inputs[1][ORDER], MASK[ORDER]), loss(inputs)[ORDER])
        return
    torch.testing.assert_close(loss([x.index_select(place, ORDER) for x in inputs]), loss(inputs)[ORDER])


def test_order_of_tokens_does_not_matter_but_which_are_compared_does() -> None:
    student, teacher = tensors("level")
    values = level_distance(student, teacher)
    torch.testing.assert_close(level_distance(student.flip(1), teacher.flip(1)), values)
    assert not torch.isclose(level_distance(student.flip(1), teacher), values).any()


def test_a_constant_on_all_channels_of_a_token_does_not_matter() -> None:
    student, teacher = tensors("level")
    shift = torch.randn(BATCH, TOKENS, 1, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(level_distance(student + shift, teacher - shift), level_distance(student, teacher))


@pytest.mark.parametrize("padding", [1e6, math.inf, math.nan])
def test_padding_has_no_influence_on_value_or_gradient(padding: float) -> None:
    student, teacher = tensors("level")
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(level_distance(student, teacher, MASK).sum(), student)
    filled = [x.detach().masked_fill(~MASK[..., None], padding) for x in (student, teacher)]
    value = level_distance(filled[0].requires_grad_(), filled[1], MASK)
    torch.testing.assert_close(value, level_distance(student, teacher, MASK))
    torch.testing.assert_close(torch.autograd.grad(value.sum(), filled[0])[0], gradient)
    assert not gradient[~MASK].any()


def test_a_mask_is_the_same_as_leaving_tokens_out() -> None:
    student, teacher = tensors("level")
    torch.testing.assert_close(
        level_distance(student, teacher, MASK)[1:2], level_distance(student[1:2, :3], teacher[1:2, :3])
    )
    assert level_distance(student, teacher, MASK)[3] == 0
    torch.testing.assert_close(level_distance(student, teacher, MASK | True), level_distance(student, teacher))


def test_rotating_spaces_does_not_matter() -> None:
    turn, teachers_turn = rotation(WIDTH), rotation(TEACHER_WIDTH)
    a, b = tensors("embedding")
    torch.testing.assert_close(embedding_distance(a @ turn, b @ turn), embedding_distance(a, b))
    a, b, c, d = tensors("pyramid")
    turned = [a @ turn, b @ turn, c @ teachers_turn, d @ teachers_turn]
    torch.testing.assert_close(pyramid(turned), pyramid([a, b, c, d]))


def test_swapping_modalities_transposes_the_pairs() -> None:
    a, b, c, d = tensors("pyramid")
    swapped = pyramid_divergence(b, a, d, c, coupling=COUPLING.T, student_scale=SCALES.T, teacher_scale=5.0)
    torch.testing.assert_close(swapped, pyramid([a, b, c, d]).mT)


def test_zero_at_agreement_four_at_opposites_and_two_for_unrelated_levels() -> None:
    a, b = tensors("level")
    zeros = torch.zeros(BATCH, dtype=torch.float64)
    torch.testing.assert_close(level_distance(a, 3 * a + 1), zeros)
    torch.testing.assert_close(level_distance(a, -a), zeros + 4)
    torch.testing.assert_close(embedding_distance(a[:, 0], 3 * a[:, 0]), zeros)
    noise = torch.randn(2, 3, 500, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(level_distance(*noise), torch.full((3,), 2.0), rtol=0, atol=0.1)
    a, b, *_ = tensors("pyramid")
    wide = [torch.cat([x, torch.zeros_like(x)], -1) for x in (a, b)]  # the same cosines
    values = pyramid_divergence(a, b, *wide, coupling=COUPLING, student_scale=5.0, teacher_scale=5.0)
    torch.testing.assert_close(values, torch.zeros_like(values))


def test_a_pair_without_coupling_is_not_computed() -> None:
    a, b, c, d = tensors("pyramid")
    coupling = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    expected = pyramid_divergence(a, b, c, d, coupling=coupling, student_scale=2.0, teacher_scale=3.0)
    for x in (a, b, c, d):
        x[1:] = math.nan
    values = pyramid_divergence(a, b, c, d, coupling=coupling, student_scale=2.0, teacher_scale=3.0)
    torch.testing.assert_close(values, expected)
    none = pyramid_divergence(a, b, c, d, coupling=torch.zeros(3, 2), student_scale=2.0, teacher_scale=3.0)
    assert none.shape == (BATCH, 3, 2)
    assert not none.any()


def test_levels_without_variance_give_a_finite_loss_and_gradient() -> None:
    student, teacher = torch.full((2, 3, WIDTH), 0.3, requires_grad=True), torch.randn(2, 3, WIDTH)
    vectors = torch.zeros(2, 3, WIDTH, requires_grad=True)
    pairs = pyramid_divergence(
        vectors, vectors, teacher, teacher, coupling=torch.eye(2), student_scale=100.0, teacher_scale=100.0
    )
    loss = level_distance(student, teacher).sum() + pairs.sum()
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (student, vectors))


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_float32_values(name: str, dtype: torch.dtype) -> None:
    loss, inputs = LOSSES[name][0], [x.to(dtype) for x in tensors(name)]
    values = loss(inputs)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, loss([x.float() for x in inputs]))
    torch.testing.assert_close(values.double(), loss([x.double() for x in inputs]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_coarsen_a_loss(name: str) -> None:
    loss, inputs = LOSSES[name][0], [x.float() for x in tensors(name)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(inputs)
    torch.testing.assert_close(inside, loss(inputs), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", LOSSES)
def test_samples_or_levels_that_do_not_pair_up_are_refused(name: str) -> None:
    loss, inputs = LOSSES[name][0], tensors(name)
    shorter = inputs[0][:2]
    with pytest.raises(ValueError, match=r"\(2, .*\(") as refusal:
        loss([shorter, *inputs[1:]])
    assert str(tuple(shorter.shape)) in str(refusal.value)
    assert str(tuple(inputs[len(inputs) // 2].shape)) in str(refusal.value)


def test_levels_that_are_not_tokens_or_have_no_fitting_mask_are_refused() -> None:
    student, teacher = tensors("level")
    with pytest.raises(ValueError, match=r"\(4, 6\).*flatten a grid"):
        level_distance(student[:, 0], teacher[:, 0])
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(4, 5, 6\)"):
        level_distance(student, teacher, MASK[:, :4])
    with pytest.raises(ValueError, match="int64"):
        level_distance(student, teacher, MASK.long())
    with pytest.raises(ValueError, match="project the student"):
        level_distance(student[..., :4], teacher)


def test_modalities_in_different_spaces_and_misshapen_couplings_are_refused() -> None:
    a, b, c, d = tensors("pyramid")
    with pytest.raises(ValueError, match=r"\(2, 4, 5\).*alignment bridge"):
        pyramid_divergence(a, b[..., :5], c, d, coupling=COUPLING, student_scale=1.0, teacher_scale=1.0)
    with pytest.raises(ValueError, match=r"\(2, 3\).*3 visual and 2 language"):
        pyramid_divergence(a, b, c, d, coupling=COUPLING.T, student_scale=1.0, teacher_scale=1.0)
    with pytest.raises(ValueError, match=r"\(2, 3\).*3 visual and 2 language"):
        pyramid_divergence(a, b, c, d, coupling=COUPLING, student_scale=1.0, teacher_scale=SCALES.T)


@pytest.mark.parametrize("name", ["level_distance", "embedding_distance", "pyramid_divergence", "prior_coupling"])
def test_signatures_hold_the_shapes_that_are_passed(name: str) -> None:
    checked = jaxtyped(typechecker=beartype)(getattr(objectives, name))
    if name == "prior_coupling":
        assert checked().shape == (4, 4)
    elif name == "level_distance":
        assert checked(*tensors("level"), MASK).shape == (BATCH,)
    elif name == "embedding_distance":
        assert checked(*tensors("embedding")).shape == (BATCH,)
    else:
        values = checked(*tensors("pyramid"), coupling=COUPLING, student_scale=SCALES, teacher_scale=2.0)
        assert values.shape == (BATCH, 3, 2)

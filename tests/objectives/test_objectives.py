"""Every objective against its definition in plain loops, its gradient, and what its docstring promises."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd import objectives
from cmapkd.objectives import (
    contrastive_gradients,
    contrastive_loss,
    ensemble_divergence,
    feature_distance,
    gradient_distance,
    interactive_divergence,
    interactive_loss,
    kl_divergence,
    sigmoid_loss,
    similarity_divergence,
)

Loss = Callable[[list[Tensor]], Tensor]
BATCH, WIDTH, TEACHER_WIDTH = 5, 4, 6

# name: (loss of a list of tensors, widths of the student's tensors, widths of the teacher's)
LOSSES: dict[str, tuple[Loss, tuple[int, ...], tuple[int, ...]]] = {
    "contrastive": (lambda x: contrastive_loss(x[0], x[1], logit_scale=7.0), (WIDTH, WIDTH), ()),
    "sigmoid": (lambda x: sigmoid_loss(x[0], x[1], logit_scale=7.0, logit_bias=-3.0), (WIDTH, WIDTH), ()),
    "kl": (lambda x: kl_divergence(x[0], x[1], temperature=2.0), (WIDTH,), (WIDTH,)),
    "feature": (lambda x: feature_distance(x[0], x[1]), (WIDTH,), (WIDTH,)),
    "interactive": (lambda x: interactive_loss(*x, logit_scale=7.0), (WIDTH, WIDTH), (WIDTH, WIDTH)),
    "cross": (
        lambda x: interactive_divergence(*x, student_scale=7.0, teacher_scale=5.0),
        (WIDTH, WIDTH),
        (WIDTH, WIDTH),
    ),
    "gradient": (
        lambda x: gradient_distance(*x, student_scale=3.0, teacher_scale=2.0),
        (WIDTH, WIDTH),
        (WIDTH, WIDTH),
    ),
    "similarity": (
        lambda x: similarity_divergence(*x, student_scale=7.0, teacher_scale=5.0, temperature=2.0),
        (WIDTH, WIDTH),
        (TEACHER_WIDTH, TEACHER_WIDTH),
    ),
    "ensemble": (
        lambda x: ensemble_divergence(
            *x[:2], [(x[2], x[3]), (x[4], x[5])], student_scale=7.0, teacher_scales=[5.0, 9.0]
        ),
        (WIDTH, WIDTH),
        (TEACHER_WIDTH, TEACHER_WIDTH, 3, 3),
    ),
}
EMBEDDING_LOSSES = [name for name in LOSSES if name != "kl"]
DISTILLING = [name for name, (_, _, teacher) in LOSSES.items() if teacher]


def tensors(name: str, *, batch: int = BATCH, seed: int = 0) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    _, student, teacher = LOSSES[name]
    return [torch.randn(batch, width, generator=draws, dtype=torch.float64) for width in student + teacher]


def rotation(width: int) -> Tensor:
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.linalg.qr(matrix)[0]


# ------------------------------------------------------------------------------------------------ definitions


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def cross_entropy(scores: list[float], right: int) -> float:
    return math.log(sum(math.exp(score) for score in scores)) - scores[right]


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def rows_of(a: Tensor, b: Tensor, scale: float) -> list[list[float]]:
    return [[scale * cosine(x, y) for y in b] for x in a]


def kl_of_rows(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        q, p = softmax([x / temperature for x in s]), softmax([x / temperature for x in t])
        total += sum(p[c] * math.log(p[c] / q[c]) for c in range(len(p)))
    return temperature**2 * total / len(student)


def test_contrastive_is_the_two_cross_entropies_written_out() -> None:
    image, text = tensors("contrastive")
    by_image, by_text = rows_of(image, text, 7.0), rows_of(text, image, 7.0)
    expected = sum(cross_entropy(by_image[i], i) + cross_entropy(by_text[i], i) for i in range(BATCH)) / (2 * BATCH)
    assert float(contrastive_loss(image, text, logit_scale=7.0)) == pytest.approx(expected, rel=1e-12)


def test_sigmoid_is_the_sum_over_combinations_written_out() -> None:
    image, text = tensors("sigmoid")
    expected = 0.0
    for i in range(BATCH):
        for j in range(BATCH):
            sign = 1 if i == j else -1
            expected += math.log(1 + math.exp(-sign * (7.0 * cosine(image[i], text[j]) - 3.0)))
    value = sigmoid_loss(image, text, logit_scale=7.0, logit_bias=-3.0)
    assert float(value) == pytest.approx(expected / BATCH, rel=1e-12)


def test_kl_is_the_sum_written_out() -> None:
    student, teacher = tensors("kl")
    expected = kl_of_rows(student.tolist(), teacher.tolist(), 2.0)
    assert float(kl_divergence(student, teacher, temperature=2.0)) == pytest.approx(expected, rel=1e-12)


def test_feature_distance_is_two_minus_two_cosines() -> None:
    student, teacher = tensors("feature")
    expected = sum(2 - 2 * cosine(s, t) for s, t in zip(student, teacher, strict=True)) / BATCH
    assert float(feature_distance(student, teacher)) == pytest.approx(expected, rel=1e-12)


def test_interactive_is_the_two_cross_entropies_written_out() -> None:
    s_image, s_text, t_image, t_text = tensors("interactive")
    by_image, by_text = rows_of(s_image, t_text, 7.0), rows_of(s_text, t_image, 7.0)
    expected = sum(cross_entropy(by_image[i], i) + cross_entropy(by_text[i], i) for i in range(BATCH)) / (2 * BATCH)
    value = interactive_loss(s_image, s_text, t_image, t_text, logit_scale=7.0)
    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_cross_is_the_two_divergences_written_out() -> None:
    s_image, s_text, t_image, t_text = tensors("cross")
    expected = (
        kl_of_rows(rows_of(s_image, t_text, 7.0), rows_of(t_image, t_text, 5.0), 1.0)
        + kl_of_rows(rows_of(s_text, t_image, 7.0), rows_of(t_text, t_image, 5.0), 1.0)
    ) / 2
    assert float(LOSSES["cross"][0]([s_image, s_text, t_image, t_text])) == pytest.approx(expected, rel=1e-11)


def summed_infonce(anchors: Tensor, candidates: Tensor, scale: float) -> Tensor:
    rows = [scale * torch.stack([a @ c for c in candidates]) for a in anchors]
    return torch.stack([row.logsumexp(0) - row[i] for i, row in enumerate(rows)]).sum()


def test_contrastive_gradients_are_those_of_the_loss() -> None:
    anchors, candidates = (torch.nn.functional.normalize(x, dim=-1).requires_grad_() for x in tensors("contrastive"))
    expected = torch.autograd.grad(summed_infonce(anchors, candidates, 7.0), (anchors, candidates))
    found = contrastive_gradients(anchors, candidates, logit_scale=7.0)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gradient_distance_is_the_sum_over_four_gradients_written_out() -> None:
    given = [torch.nn.functional.normalize(x, dim=-1).requires_grad_() for x in tensors("gradient")]
    s_image, s_text, t_image, t_text = given
    expected = 0.0
    for ours, theirs in (((s_image, s_text), (t_image, t_text)), ((s_text, s_image), (t_text, t_image))):
        mine = torch.autograd.grad(summed_infonce(*ours, 3.0), ours)
        targets = torch.autograd.grad(summed_infonce(*theirs, 2.0), theirs)
        for x, y in zip(mine, targets, strict=True):
            expected += (
                sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)) / BATCH
            )
    assert LOSSES["gradient"][0](given).item() == pytest.approx(expected, rel=1e-11)


def test_similarity_is_the_two_divergences_written_out() -> None:
    s_image, s_text, t_image, t_text = tensors("similarity")
    expected = (
        kl_of_rows(rows_of(s_image, s_text, 7.0), rows_of(t_image, t_text, 5.0), 2.0)
        + kl_of_rows(rows_of(s_text, s_image, 7.0), rows_of(t_text, t_image, 5.0), 2.0)
    ) / 2
    assert float(LOSSES["similarity"][0]([s_image, s_text, t_image, t_text])) == pytest.approx(expected, rel=1e-11)


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name: str) -> None:
    loss, student, _ = LOSSES[name]
    inputs = tensors(name, batch=3)
    count = len(student)
    assert gradcheck(lambda *x: loss([*x, *inputs[count:]]), [x.requires_grad_() for x in inputs[:count]])


def test_gradient_of_scales_and_bias() -> None:
    image, text = tensors("contrastive", batch=3)
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    scale.requires_grad_(), bias.requires_grad_()
    assert gradcheck(lambda s: contrastive_loss(image, text, logit_scale=s), [scale])
    assert gradcheck(lambda s, b: sigmoid_loss(image, text, logit_scale=s, logit_bias=b), [scale, bias])
    assert gradcheck(lambda s: interactive_loss(image, text, text, image, logit_scale=s), [scale])
    for both in (interactive_divergence, gradient_distance):
        assert gradcheck(lambda s, f=both: f(image, text, text, image, student_scale=s, teacher_scale=3.0), [scale])
    assert gradcheck(
        lambda s: similarity_divergence(image, text, text, text, student_scale=s, teacher_scale=3.0), [scale]
    )


@pytest.mark.parametrize("name", DISTILLING)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    loss, student, _ = LOSSES[name]
    inputs = [x.requires_grad_() for x in tensors(name)]
    loss(inputs).backward()
    count = len(student)
    assert all(x.grad is not None and bool(x.grad.any()) for x in inputs[:count])
    assert all(x.grad is None for x in inputs[count:])


@pytest.mark.parametrize(
    ("name", "loss"),
    [("similarity", similarity_divergence), ("cross", interactive_divergence), ("gradient", gradient_distance)],
)
def test_no_gradient_reaches_the_teachers_scale(name: str, loss: Callable[..., Tensor]) -> None:
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    value = loss(*(x.requires_grad_() for x in tensors(name)), student_scale=1.0, teacher_scale=scale)
    value.backward()
    assert scale.grad is None


# ------------------------------------------------------------------------------------------------ invariants


@pytest.mark.parametrize("name", EMBEDDING_LOSSES)
def test_lengths_of_embeddings_do_not_matter(name: str) -> None:
    loss, inputs = LOSSES[name][0], tensors(name)
    lengths = torch.tensor([0.01, 0.5, 1.0, 3.0, 200.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss([x * lengths for x in inputs]), loss(inputs))


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_pairs_does_not_matter(name: str) -> None:
    loss, inputs = LOSSES[name][0], tensors(name)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(loss([x[order] for x in inputs]), loss(inputs))


@pytest.mark.parametrize("name", LOSSES)
def test_which_rows_are_paired_does_matter(name: str) -> None:
    loss, inputs = LOSSES[name][0], tensors(name)
    assert not torch.isclose(loss([inputs[0].roll(1, 0), *inputs[1:]]), loss(inputs))


@pytest.mark.parametrize("name", ["contrastive", "sigmoid", "feature", "interactive", "cross", "gradient"])
def test_rotating_the_common_space_does_not_matter(name: str) -> None:
    loss, inputs = LOSSES[name][0], tensors(name)
    torch.testing.assert_close(loss([x @ rotation(WIDTH) for x in inputs]), loss(inputs))


def test_rotating_either_models_own_space_does_not_change_similarities() -> None:
    loss, (a, b, c, d) = LOSSES["similarity"][0], tensors("similarity")
    turn, teachers_turn = rotation(WIDTH), rotation(TEACHER_WIDTH)
    torch.testing.assert_close(loss([a @ turn, b @ turn, c @ teachers_turn, d @ teachers_turn]), loss([a, b, c, d]))


def test_swapping_modalities_does_not_matter() -> None:
    a, b, c, d = tensors("similarity")
    for name, swapped, straight in (
        ("contrastive", [b, a], [a, b]),
        ("sigmoid", [b, a], [a, b]),
        ("similarity", [b, a, d, c], [a, b, c, d]),
        *(
            (name, [b, a, d[:, :WIDTH], c[:, :WIDTH]], [a, b, c[:, :WIDTH], d[:, :WIDTH]])
            for name in ("interactive", "cross", "gradient")
        ),
    ):
        torch.testing.assert_close(LOSSES[name][0](swapped), LOSSES[name][0](straight))


def test_kl_ignores_a_constant_per_row_and_is_never_negative() -> None:
    student, teacher = tensors("kl")
    shift = torch.arange(BATCH, dtype=torch.float64)[:, None]
    expected = kl_divergence(student, teacher)
    torch.testing.assert_close(kl_divergence(student + shift, teacher - 3 * shift), expected)
    assert float(expected) > 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_at_a_temperature_is_that_of_divided_logits(temperature: float) -> None:
    student, teacher = tensors("kl")
    expected = kl_divergence(student / temperature, teacher / temperature) * temperature**2
    torch.testing.assert_close(kl_divergence(student, teacher, temperature=temperature), expected)


def test_zero_at_agreement() -> None:
    a, b = tensors("contrastive")
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(kl_divergence(a, a + 5), zero)
    torch.testing.assert_close(feature_distance(a, 3 * a), zero)
    torch.testing.assert_close(feature_distance(a, -a), zero + 4)
    torch.testing.assert_close(gradient_distance(a, b, 3 * a, b, student_scale=5.0, teacher_scale=5.0), zero)
    torch.testing.assert_close(interactive_divergence(a, b, a, 2 * b, student_scale=5.0, teacher_scale=5.0), zero)
    wide = torch.cat([a, torch.zeros_like(a)], 1), torch.cat([b, torch.zeros_like(b)], 1)  # the same similarities
    torch.testing.assert_close(similarity_divergence(a, b, *wide, student_scale=5.0, teacher_scale=5.0), zero)


def test_uninformative_embeddings() -> None:
    same = torch.ones(BATCH, WIDTH)
    assert float(contrastive_loss(same, same, logit_scale=9.0)) == pytest.approx(math.log(BATCH))
    assert float(interactive_loss(same, same, same, same, logit_scale=9.0)) == pytest.approx(math.log(BATCH))
    assert float(sigmoid_loss(same, same, logit_scale=0.0, logit_bias=0.0)) == pytest.approx(BATCH * math.log(2))


def test_distances_do_not_depend_on_the_width() -> None:
    student, teacher = tensors("feature")
    padded = [torch.cat([x, torch.zeros(BATCH, 100, dtype=torch.float64)], 1) for x in (student, teacher)]
    torch.testing.assert_close(feature_distance(*padded), feature_distance(student, teacher))
    narrow, wide = (
        gradient_distance(x, x.roll(1, 0), y, y, student_scale=3.0, teacher_scale=2.0)
        for x, y in ((student, teacher), padded)
    )
    torch.testing.assert_close(wide, narrow)


def test_an_embedding_of_zeros_gives_a_finite_loss_and_gradient() -> None:
    image, text = torch.zeros(3, WIDTH, requires_grad=True), torch.randn(3, WIDTH)
    loss = contrastive_loss(image, text, logit_scale=100.0) + feature_distance(image, text)
    loss.backward()
    assert bool(loss.isfinite())
    assert image.grad is not None
    assert bool(image.grad.isfinite().all())


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_a_float32_loss(name: str, dtype: torch.dtype) -> None:
    loss, inputs = LOSSES[name][0], [x.to(dtype) for x in tensors(name)]
    value = loss(inputs)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss([x.float() for x in inputs]))
    torch.testing.assert_close(value, loss([x.double() for x in inputs]).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_coarsen_a_loss(name: str) -> None:
    loss, inputs = LOSSES[name][0], [x.float() for x in tensors(name, batch=32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(inputs)
    torch.testing.assert_close(inside, loss(inputs), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_do_not_pair_up_are_refused(name: str) -> None:
    loss, inputs = LOSSES[name][0], tensors(name)
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        loss([inputs[0][:4], *inputs[1:]])


@pytest.mark.parametrize("name", ["contrastive", "sigmoid", "similarity", "interactive", "cross", "gradient"])
def test_embeddings_that_are_not_matrices_are_refused(name: str) -> None:
    loss, inputs = LOSSES[name][0], tensors(name)
    with pytest.raises(ValueError, match="one row for each pair"):
        loss([x[None] for x in inputs])


def test_widths_that_differ_are_refused_where_channels_are_compared() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 6)
    with pytest.raises(ValueError, match="project the student"):
        feature_distance(a, b)
    with pytest.raises(ValueError, match="project the student"):
        interactive_loss(a, a, b, b, logit_scale=1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        kl_divergence(torch.randn(2, 3), torch.randn(2, 3), temperature=temperature)


# ------------------------------------------------------------------------------------------------ other people's code


def open_clips_losses() -> ModuleType:
    """Its file of losses alone: importing the package takes ten times as long as all these tests."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OPEN_CLIP = open_clips_losses()


def units(name: str) -> list[Tensor]:
    return [torch.nn.functional.normalize(x.float(), dim=-1) for x in tensors(name, batch=16)]


def test_contrastive_equals_open_clips() -> None:
    image, text = units("contrastive")
    ours = contrastive_loss(image, text, logit_scale=20.0)
    torch.testing.assert_close(ours, OPEN_CLIP.ClipLoss()(image, text, 20.0), rtol=1e-5, atol=0)


def test_sigmoid_equals_open_clips() -> None:
    image, text = units("sigmoid")
    ours = sigmoid_loss(image, text, logit_scale=10.0, logit_bias=-10.0)
    torch.testing.assert_close(ours, OPEN_CLIP.SigLipLoss()(image, text, 10.0, -10.0), rtol=1e-5, atol=0)


def test_similarity_equals_open_clips_distillation_up_to_the_teachers_entropy() -> None:
    embeddings = units("similarity")
    student, teacher = [x.requires_grad_() for x in embeddings[:2]], embeddings[2:]
    ours = similarity_divergence(*student, *teacher, student_scale=20.0, teacher_scale=10.0)
    _, theirs = OPEN_CLIP.DistillClipLoss()(*student, 20.0, *teacher, 10.0)
    logits = 10.0 * teacher[0] @ teacher[1].T
    entropy = torch.stack([-(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean() for z in (logits, logits.T)]).mean()
    torch.testing.assert_close(ours, theirs - entropy, rtol=1e-5, atol=1e-6)
    for x, mine, other in zip(
        student,
        torch.autograd.grad(ours, student),
        torch.autograd.grad(theirs, student),
        strict=True,
    ):
        # theirs does not normalise, so its gradient also has a part along the embedding, which normalising removes
        tangential = other - (other * x).sum(-1, keepdim=True) * x
        torch.testing.assert_close(mine, tangential, rtol=1e-4, atol=1e-6)


# those of one scalar from matrices; the other objectives' files check their own
SCALARS = (
    "contrastive_loss",
    "feature_distance",
    "gradient_distance",
    "interactive_divergence",
    "interactive_loss",
    "kl_divergence",
    "sigmoid_loss",
    "similarity_divergence",
)


@pytest.mark.parametrize("name", SCALARS)
def test_signatures_hold_the_shapes_that_are_passed(name: str) -> None:
    checked = jaxtyped(typechecker=beartype)(getattr(objectives, name))
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    scales = {
        "contrastive_loss": {"logit_scale": torch.tensor(2.0)},
        "sigmoid_loss": {"logit_scale": 2.0, "logit_bias": torch.tensor(1.0)},
        "interactive_loss": {"logit_scale": 2.0},
    }.get(name, {})
    if name in ("similarity_divergence", "interactive_divergence", "gradient_distance"):
        scales = {"student_scale": 2.0, "teacher_scale": torch.tensor(3.0)}
    pairs = (a, b, a, b) if name.startswith(("interactive", "similarity", "gradient")) else (a, b)
    assert checked(*pairs, **scales).shape == ()

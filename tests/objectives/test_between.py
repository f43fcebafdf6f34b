"""Divergences between models: each as sums over rows, what learns by it, and what its docstring promises."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor

from cmapkd.objectives import crosswise_divergence, vertical_divergence

BATCH, WIDTH = 5, 4
LOSSES: dict[str, Callable[..., Tensor]] = {
    "vertical": lambda *x: vertical_divergence(*x, image_scale=7.0, text_scale=5.0),
    "crosswise": lambda *x: crosswise_divergence(*x, logit_scale=6.0),
}


def embeddings(batch: int = BATCH) -> list[Tensor]:
    """The student's images and texts, and the teacher's."""
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(batch, WIDTH, generator=draws, dtype=torch.float64) for _ in range(4)]


def softmaxes(rows: Tensor, columns: Tensor, scale: float) -> list[list[float]]:
    found = []
    for row in rows:
        cosines = [float(row @ column) / math.sqrt(float(row @ row) * float(column @ column)) for column in columns]
        powers = [math.exp(scale * cosine) for cosine in cosines]
        found.append([power / sum(powers) for power in powers])
    return found


def kl(target: list[list[float]], follower: list[list[float]]) -> float:
    """KL(target || follower), mean over rows."""
    terms = [p * math.log(p / q) for ps, qs in zip(target, follower, strict=True) for p, q in zip(ps, qs, strict=True)]
    return sum(terms) / len(target)


# ------------------------------------------------------------------------------------------------ definitions


def test_vertical_is_the_two_divergences_written_out() -> None:
    s_image, s_text, t_image, t_text = embeddings()
    of_teacher = kl(softmaxes(t_text, s_text, 5.0), softmaxes(t_image, s_image, 7.0))
    of_student = kl(softmaxes(s_text, t_text, 5.0), softmaxes(s_image, t_image, 7.0))
    expected = (of_teacher + of_student) / 2
    assert float(LOSSES["vertical"](s_image, s_text, t_image, t_text)) == pytest.approx(expected, rel=1e-12)


def test_crosswise_is_the_four_divergences_written_out() -> None:
    s_image, s_text, t_image, t_text = embeddings()
    expected = 0.0
    for one, other in (((t_image, s_text), (t_text, s_image)), ((s_text, t_image), (s_image, t_text))):
        a, b = softmaxes(*one, 6.0), softmaxes(*other, 6.0)
        expected += (kl(b, a) + kl(a, b)) / 4
    assert float(LOSSES["crosswise"](s_image, s_text, t_image, t_text)) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------ gradients


def numerical(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Central differences."""
    found, step = torch.zeros_like(at).reshape(-1), 1e-6
    for i in range(at.numel()):
        change = torch.zeros_like(found)
        change[i] = step
        change = change.reshape(at.shape)
        found[i] = (loss(at + change) - loss(at - change)) / (2 * step)
    return found.reshape(at.shape)


def mean_kl(target: Tensor, follower: Tensor) -> Tensor:
    return (target.exp() * (target - follower)).sum(-1).mean()


def log_softmax(rows: Tensor, columns: Tensor, scale: Tensor | float) -> Tensor:
    rows, columns = (torch.nn.functional.normalize(x, dim=-1) for x in (rows, columns))
    return (scale * rows @ columns.T).log_softmax(-1)


def test_vertical_moves_images_towards_texts_that_stand_still() -> None:
    s_image, s_text, t_image, t_text = (x.requires_grad_() for x in embeddings())
    image_scale, text_scale = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (7.0, 5.0))
    vertical_divergence(s_image, s_text, t_image, t_text, image_scale=image_scale, text_scale=text_scale).backward()
    assert [x.grad for x in (s_text, t_image, t_text, text_scale)] == [None] * 4
    fixed = s_text.detach(), t_image.detach(), t_text.detach()

    def loss(image: Tensor, scale: Tensor) -> Tensor:
        return vertical_divergence(image, *fixed, image_scale=scale, text_scale=5.0)

    assert s_image.grad is not None
    assert image_scale.grad is not None
    wanted = numerical(lambda x: loss(x, image_scale.detach()), s_image.detach())
    torch.testing.assert_close(s_image.grad, wanted, rtol=1e-6, atol=1e-8)
    wanted = numerical(lambda x: loss(s_image.detach(), x), image_scale.detach())
    torch.testing.assert_close(image_scale.grad, wanted, rtol=1e-6, atol=1e-8)


def test_crosswise_moves_each_side_towards_the_other_that_stands_still() -> None:
    given = [x.requires_grad_() for x in embeddings()]
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    crosswise_divergence(*given, logit_scale=scale).backward()
    assert given[2].grad is None
    assert given[3].grad is None
    s_image, s_text, t_image, t_text = (x.detach() for x in given)
    pairs = (((t_image, "text"), (t_text, "image")), (("text", t_image), ("image", t_text)))

    def logits(pair: tuple[Tensor | str, Tensor | str], known: dict[str, Tensor], scale: Tensor) -> Tensor:
        rows, columns = (known[side] if isinstance(side, str) else side for side in pair)
        return log_softmax(rows, columns, scale)

    def loss(image: Tensor, text: Tensor, scale_now: Tensor) -> Tensor:
        """The targets are those of the embeddings and the scale as they were."""
        moving, still = {"image": image, "text": text}, {"image": s_image, "text": s_text}
        total = torch.zeros((), dtype=torch.float64)
        for one, other in pairs:
            for target, follower in ((one, other), (other, one)):
                frozen = logits(target, still, scale.detach())
                total += mean_kl(frozen, logits(follower, moving, scale_now)) / 4
        return total

    wanted = numerical(lambda x: loss(x, s_text, scale.detach()), s_image)
    torch.testing.assert_close(given[0].grad, wanted, rtol=1e-6, atol=1e-8)
    wanted = numerical(lambda x: loss(s_image, x, scale.detach()), s_text)
    torch.testing.assert_close(given[1].grad, wanted, rtol=1e-6, atol=1e-8)
    wanted = numerical(lambda x: loss(s_image, s_text, x), scale.detach())
    torch.testing.assert_close(scale.grad, wanted, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------ invariants


@pytest.mark.parametrize("name", LOSSES)
def test_zero_at_agreement(name: str) -> None:
    image, text, _, _ = embeddings()
    zero = torch.zeros((), dtype=torch.float64)
    if name == "vertical":  # both modalities alike, whatever the models
        torch.testing.assert_close(vertical_divergence(image, image, text, text, image_scale=6.0, text_scale=6.0), zero)
    else:  # T_i S_t^T = T_t S_i^T
        torch.testing.assert_close(LOSSES[name](image, text, 2 * image, 3 * text), crosswise_of_itself(image, text))
        torch.testing.assert_close(LOSSES[name](image, image, text, text), zero)


def crosswise_of_itself(image: Tensor, text: Tensor) -> Tensor:
    """Of a student that is the teacher: how far its similarities are from being symmetric, which is not zero."""
    there, back = log_softmax(image, text, 6.0), log_softmax(text, image, 6.0)
    asymmetry = (mean_kl(there, back) + mean_kl(back, there)) / 2
    assert float(asymmetry) > 0.01
    return asymmetry


@pytest.mark.parametrize("name", LOSSES)
def test_lengths_the_order_of_pairs_and_a_turn_of_the_space_do_not_matter(name: str) -> None:
    given = embeddings()
    expected = LOSSES[name](*given)
    lengths = torch.tensor([0.01, 0.5, 1.0, 3.0, 200.0], dtype=torch.float64)[:, None]
    turn = torch.linalg.qr(embeddings()[0][:WIDTH])[0]
    order = torch.tensor([3, 0, 4, 1, 2])
    for changed in ([x * lengths for x in given], [x @ turn for x in given], [x[order] for x in given]):
        torch.testing.assert_close(LOSSES[name](*changed), expected)
    assert not torch.isclose(LOSSES[name](given[0].roll(1, 0), *given[1:]), expected)


def test_only_vertical_has_a_leading_modality() -> None:
    s_image, s_text, t_image, t_text = embeddings()
    swapped = s_text, s_image, t_text, t_image
    torch.testing.assert_close(LOSSES["crosswise"](*swapped), LOSSES["crosswise"](s_image, s_text, t_image, t_text))
    assert not torch.isclose(LOSSES["vertical"](*swapped), LOSSES["vertical"](s_image, s_text, t_image, t_text))


# ------------------------------------------------------------------------------------------------ precision, refusals


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_give_a_float32_loss(name: str, dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in embeddings(32)]
    value = LOSSES[name](*given)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, LOSSES[name](*(x.double() for x in given)).float(), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LOSSES[name](*given)
    torch.testing.assert_close(inside, value, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    s_image, s_text, t_image, t_text = embeddings()
    with pytest.raises(ValueError, match=r"one row for each pair, got .*\(4, 4\)"):
        LOSSES[name](s_image[:4], s_text, t_image, t_text)
    with pytest.raises(ValueError, match=r"student image embedding has shape \(5, 3\).*project the student"):
        LOSSES[name](s_image[:, :3], s_text, t_image, t_text)
    with pytest.raises(ValueError, match=r"student text embedding has shape \(5, 3\).*project the student"):
        LOSSES[name](s_image, s_text[:, :3], t_image, t_text)


def test_signatures_hold_the_shapes_that_are_passed() -> None:
    given = embeddings(3)
    checked = jaxtyped(typechecker=beartype)
    assert checked(vertical_divergence)(*given, image_scale=2.0, text_scale=torch.tensor(3.0)).shape == ()
    assert checked(crosswise_divergence)(*given, logit_scale=torch.tensor(3.0)).shape == ()

"""Blocks of the sigmoid loss: their sums are the loss, their gradients its gradients, whatever the blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from cmapkd.methods.sigmoid_ring import ring_sigmoid_loss
from cmapkd.models import Features, TowerFeatures
from cmapkd.objectives import sigmoid_loss
from cmapkd.objectives.blocks import sigmoid_block

BATCH = 7
PICTURES = torch.tensor([0, 1, 0, 2, 2, 2, 3])


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, BATCH, 5, generator=draws, dtype=torch.float64)
    scale, bias = torch.tensor([6.0, -2.0], dtype=torch.float64)
    return image.requires_grad_(), text.requires_grad_(), scale.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("pictures", [None, PICTURES])
@pytest.mark.parametrize("cuts", [[0, 7], [0, 3, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_blocks_make_the_loss(cuts: list[int], pictures: Tensor | None, chunk: int | None) -> None:
    image, text, scale, bias = inputs()
    loss = sigmoid_loss(image, text, logit_scale=scale, logit_bias=bias, pictures=pictures)
    images, texts = (scale * F.normalize(image, dim=-1)).detach(), F.normalize(text, dim=-1).detach()
    rows, columns = images.clone().requires_grad_(), texts.clone().requires_grad_()
    # the same of its own variables, which blocks have the gradients by
    logits = rows @ columns.T + bias
    own = torch.eye(BATCH, dtype=torch.bool)
    nats = F.softplus(torch.where(own, -logits, logits))
    if pictures is not None:
        nats = nats.masked_fill((pictures[:, None] == pictures) & ~own, 0.0)
    torch.testing.assert_close(nats.sum() / BATCH, loss, rtol=0, atol=1e-12)
    expected = torch.autograd.grad(nats.sum(), (rows, columns, bias))
    total = loss.new_zeros(())
    found = [torch.zeros_like(each) for each in expected]
    for top, bottom in pairwise(cuts):
        for left, right in pairwise(cuts):
            block = sigmoid_block(
                images[top:bottom], texts[left:right], bias.detach(),
                first_image=top, first_text=left, pictures=pictures, chunk=chunk,
            )  # fmt: skip
            total = total + block.nats
            found[0][top:bottom] += block.by_images
            found[1][left:right] += block.by_texts
            found[2] += block.by_bias
    torch.testing.assert_close(total / BATCH, loss, rtol=0, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pictures", [None, PICTURES])
def test_gradcheck(pictures: Tensor | None) -> None:
    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return 3.0 * ring_sigmoid_loss(Features(TowerFeatures(image), TowerFeatures(text), scale, bias), pictures)

    assert gradcheck(loss, inputs())


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    image, text, scale, bias = inputs()
    loss = ring_sigmoid_loss(Features(TowerFeatures(image), TowerFeatures(text), scale, bias))
    (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match="written out and was to be differentiated again"):
        torch.autograd.grad(gradient.square().sum(), text, allow_unused=True)


def test_without_gradients_there_is_one_product() -> None:
    image, text, _, bias = (each.detach() for each in inputs())
    counts = []
    for gradients in (False, True):
        with FlopCounterMode(display=False) as counter:
            block = sigmoid_block(image, text, bias, first_image=0, first_text=0, gradients=gradients)
        counts.append(counter.get_total_flops() / (2 * BATCH * BATCH * 5))
        assert bool(block.by_images.any()) == gradients
    assert counts == [1, 2]  # and one in place, which torch's counter does not know


def test_a_vector_of_one_number_is_a_bias_too() -> None:
    """As some libraries have it."""
    image, text, scale, bias = inputs()
    wide = bias.detach().reshape(1).requires_grad_()
    losses = [
        ring_sigmoid_loss(Features(TowerFeatures(image), TowerFeatures(text), scale, each)) for each in (bias, wide)
    ]
    assert torch.equal(*losses)
    losses[1].backward()
    assert wide.grad is not None
    assert wide.grad.shape == (1,)


def test_far_logits_are_finite_in_float32() -> None:
    image = torch.eye(4).requires_grad_()
    text = -torch.eye(4)
    loss = ring_sigmoid_loss(
        Features(TowerFeatures(image), TowerFeatures(text), torch.tensor(500.0), torch.tensor(-10.0))
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(510.0, rel=1e-5)
    assert image.grad is not None
    assert image.grad.isfinite().all()


def test_a_chunk_is_at_least_one_row() -> None:
    image, text, _, bias = inputs()
    with pytest.raises(ValueError, match="chunk must be at least one row, got 0"):
        sigmoid_block(image, text, bias, first_image=0, first_text=0, chunk=0)

"""SigLIP's loss over several processes without a gather: texts go round, and each process meets them with its images.

A process holds batch / processes texts at a time, and computes that share of the loss (Zhai et al. 2023,
arXiv:2303.15343, section 3.3). The texts' gradients go round with them. Sent while the block is computed are the next
texts; their gradients follow it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.features import own_place, pass_on
from cmapkd.models import Features
from cmapkd.objectives.blocks import sigmoid_block
from cmapkd.objectives.common import unit
from cmapkd.objectives.derivatives import differentiable_once


def ring_sigmoid_loss(own: Features, pictures: Int[Tensor, " batch"] | None = None) -> Float[Tensor, ""]:
    """`sigmoid_loss` of the whole batch, from the embeddings of this process's samples alone.

    Value and gradient are those of `sigmoid_loss` of gathered embeddings: every process has the value of the whole
    batch, and the average of parameters' gradients over the processes is the gradient of it.

    Args:
        own: of this process's samples, with a logit bias. Every process has equally many.
        pictures: of each pair of the whole batch, see `sigmoid_loss`.
    """
    assert own.logit_bias is not None
    images, texts = own.logit_scale * unit(own.image.embedding), unit(own.text.embedding)
    loss: Tensor = _Ring.apply(images, texts, own.logit_bias.to(images.dtype), pictures)
    return loss


class _Ring(torch.autograd.Function):
    """Gradients are made in the forward pass: only a number comes from above."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, bias: Tensor, pictures: Tensor | None) -> Float[Tensor, ""]:
        rank, processes = own_place()
        share, learns = len(images), any(ctx.needs_input_grad)
        nats, by_images, by_bias = bias.new_zeros(()), torch.zeros_like(images), bias.new_zeros(())
        held, by_held = texts, torch.zeros_like(texts)
        for hop in range(processes):
            arriving = pass_on(held) if hop < processes - 1 else None
            owner = (rank - hop) % processes
            block = sigmoid_block(
                images,
                held,
                bias.reshape(()),
                first_image=rank * share,
                first_text=owner * share,
                pictures=pictures,
                gradients=learns,
            )
            nats, by_images, by_bias = nats + block.nats, by_images + block.by_images, by_bias + block.by_bias
            if learns:  # after the last one every gradient is with its texts' own process
                by_held = pass_on(by_held + block.by_texts)()
            held = held if arriving is None else arriving()
        if processes > 1:
            dist.all_reduce(nats)
        # The wrapper averages over processes, and only this one has the gradient by its own embeddings.
        ctx.share = share
        ctx.save_for_backward(images, texts, bias, by_images, by_held, by_bias)
        return nats / (processes * share)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, by_loss: Tensor) -> Any:
        _, _, bias, by_images, by_texts, by_bias = ctx.saved_tensors
        factor = by_loss / ctx.share
        return factor * by_images, factor * by_texts, (factor * by_bias).reshape(bias.shape), None

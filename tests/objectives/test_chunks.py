"""In-batch losses some rows at a time: the same values and gradients as at once, with no logits kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cmapkd.objectives import (
    chunks,
    contrastive_loss,
    crosswise_divergence,
    ensemble_divergence,
    gradient_distance,
    interactive_divergence,
    interactive_loss,
    neighbour_divergence,
    pyramid_divergence,
    relation_distance,
    sigmoid_loss,
    similarity_divergence,
    token_contrast,
    vertical_divergence,
)

BATCH = 7
LOSSES: dict[str, Callable[..., Tensor]] = {  # of four [batch, dim] tensors and a scale
    "contrastive": lambda a, b, c, d, s, **x: contrastive_loss(a, b, logit_scale=s, **x),
    "sigmoid": lambda a, b, c, d, s, **x: sigmoid_loss(a, b, logit_scale=s, logit_bias=-s / 3, **x),
    "interactive": lambda a, b, c, d, s, **x: interactive_loss(a, b, c, d, logit_scale=s, **x),
    "cross": lambda a, b, c, d, s, **x: interactive_divergence(a, b, c, d, student_scale=s, teacher_scale=4.0, **x),
    "vertical": lambda a, b, c, d, s, **x: vertical_divergence(a, b, c, d, image_scale=s, text_scale=4.0, **x),
    "crosswise": lambda a, b, c, d, s, **x: crosswise_divergence(a, b, c, d, logit_scale=s, **x),
    "gradient": lambda a, b, c, d, s, **x: gradient_distance(a, b, c, d, student_scale=s / 3, teacher_scale=3.0, **x),
    "similarity": lambda a, b, c, d, s, **x: similarity_divergence(
        a, b, c, d, student_scale=s, teacher_scale=4.0, temperature=2.0, **x
    ),
    "ensemble": lambda a, b, c, d, s, **x: ensemble_divergence(
        a, b, [(c, d), (d, c + d)], student_scale=s, teacher_scales=[4.0, 9.0], **x
    ),
    "neighbours": lambda a, b, c, d, s, **x: (
        s * neighbour_divergence(a, c, neighbours=2, bandwidth=1.0, temperature=0.2, **x)
    ),
    "tokens": lambda a, b, c, d, s, **x: s * token_contrast(a, c, temperature=0.2, **x),
    "relation": lambda a, b, c, d, s, **x: s * relation_distance(a, c, **x),
    "pyramid": lambda a, b, c, d, s, **x: pyramid_divergence(
        torch.stack([a, b]),
        torch.stack([b, a + b]),
        torch.stack([c, d]),
        torch.stack([d, c + d]),
        coupling=torch.tensor([[1.0, 0.5], [0.0, 2.0]]),
        student_scale=s * torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=s.dtype),
        teacher_scale=5.0,
        **x,
    ),
}


def inputs(size: int = BATCH) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    rows = [torch.randn(size, 5, generator=draws, dtype=torch.float64).requires_grad_() for _ in range(4)]
    return [*rows, torch.tensor(6.0, dtype=torch.float64, requires_grad=True)]


def value_and_gradients(name: str, **options: int) -> list[Tensor]:
    given = inputs()
    value = LOSSES[name](*given, **options)
    weights = torch.arange(1.0, value.numel() + 1, dtype=torch.float64).reshape(value.shape)
    (value * weights).sum().backward()
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in given)]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("name", LOSSES)
def test_chunked_equals_whole_in_value_and_gradient(name: str, chunk: int) -> None:
    for found, expected in zip(value_and_gradients(name, chunk=chunk), value_and_gradients(name), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_large_batches_keep_no_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> int:
        """Elements of the largest tensor that waits for the backward pass."""
        largest = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            LOSSES[name](*inputs(40))
        return largest

    assert kept() >= 40 * 40
    for name_of_limit, limit in (("WHOLE_UP_TO", 1599), ("CHUNK_LOGITS", 400), ("CHUNK_ROWS", 1)):
        monkeypatch.setattr(chunks, name_of_limit, limit)
    assert kept() < 40 * 40


def test_rows_are_chosen_by_the_size_of_the_batch() -> None:
    assert chunks.chunk_rows(2048, 2048, None) == 2048
    assert chunks.chunk_rows(4096, 2048, None) == 512
    assert chunks.chunk_rows(2**15, 2**15, None) == 256
    assert chunks.chunk_rows(10, 2**30, None) == 10
    assert chunks.chunk_rows(10, 10, 4) == 4


@pytest.mark.parametrize("name", LOSSES)
def test_a_chunk_is_at_least_one_row(name: str) -> None:
    with pytest.raises(ValueError, match="chunk must be at least one row, got 0"):
        LOSSES[name](*inputs(), chunk=0)


# ------------------------------------------------------------------------------------------------ shares of the rows


@pytest.mark.parametrize("dim", [0, 1])
def test_shares_of_the_rows_are_all_rows(dim: int) -> None:
    rows, columns = torch.randn(2, 6, 6, dtype=torch.float64)
    shares: list[Tensor] = []

    def gather(own: Tensor) -> Tensor:
        shares.append(own)
        return own

    def function(*each: Tensor) -> Tensor:
        return (each[0] * each[1]).cumsum(1 - dim)  # along what is no row

    for number in range(3):
        with chunks.split_rows(number, 3, gather):
            assert chunks.chunk_rows(6, 6, None) == 2
            assert chunks.columns_at_once(6, 6, None) == 6
            chunks.by_rows(function, rows, columns, size=1, dim=dim)
    torch.testing.assert_close(torch.cat(shares).movedim(0, dim), function(rows, columns))


def test_rows_that_do_not_divide_are_computed_whole() -> None:
    def gather(own: Tensor) -> Tensor:
        raise AssertionError("nothing was shared")

    rows = torch.randn(7, 3)
    with chunks.split_rows(1, 2, gather):
        assert chunks.chunk_rows(7, 3, None) == 7
        assert torch.equal(chunks.map_split_rows(torch.exp, rows), rows.exp())
    assert torch.equal(chunks.map_split_rows(torch.exp, rows), rows.exp())

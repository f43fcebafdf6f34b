"""Attention routing: it starts uniform, finds what the levels' own vectors tell, and is bounded as the gate is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from weighting_support import DIM, ITEMS, entropy, make, settled, step

from cmapkd.weighting import AttentionConfig, AttentionWeighting, entropy_floor

WIDTH = DIM // len(ITEMS)


def told_by_one_level(size: int = 8) -> tuple[Tensor, Tensor]:
    """Only the second level's vector tells for which samples that level is easy, and for which hard."""
    draws = torch.Generator().manual_seed(4)
    context = torch.randn(1, DIM, generator=draws).repeat(size, 1)
    context[::2, WIDTH : 2 * WIDTH] *= -1
    return torch.tensor([[1.0, 0.1, 1.0, 1.0], [1.0, 1.9, 1.0, 1.0]]).repeat(size // 2, 1), context


def train(weighting: torch.nn.Module, losses: Tensor, context: Tensor, *, steps: int = 300) -> Tensor:
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.01)
    for _ in range(steps):
        weights = step(weighting, losses, context, optimizer)
    return weights


def test_the_attention_written_out() -> None:
    weighting = settled("attention").eval()
    assert isinstance(weighting, AttentionWeighting)
    losses, context = told_by_one_level()
    logits = torch.zeros(8, 4)
    for sample in range(8):
        for item, key in enumerate(weighting.keys):
            vector = context[sample, item * WIDTH : (item + 1) * WIDTH]
            standard = (vector - vector.mean()) / (vector.var(unbiased=False) + 1e-5).sqrt()
            logits[sample, item] = weighting.query @ (key.weight @ standard + key.bias) / len(weighting.query) ** 0.5
    expected = 4 * F.softmax(logits / weighting.temperature, dim=-1)
    torch.testing.assert_close(weighting(losses, context).weights, expected.detach())


def test_a_level_is_weighted_by_what_its_own_vector_tells() -> None:
    losses, context = told_by_one_level()
    weights = train(make("attention"), losses, context)
    assert (weights.argmax(-1) == 1).tolist() == [True, False] * 4
    assert float(entropy(weights).min()) > entropy_floor(4, 0.5)
    plain = train(make("attention", plain=True), losses, context)
    assert float(plain[::2, 1].min()) > 3.8  # without bounds it collapses, where it is told enough to


def test_vectors_that_tell_nothing_leave_what_all_samples_share() -> None:
    losses = torch.tensor([0.1, 1.0, 1.0, 1.0]).expand(8, 4)
    weights = train(make("attention"), losses, torch.zeros(8, DIM))
    torch.testing.assert_close(weights, weights[:1].expand(8, 4))  # the keys' biases alone
    torch.testing.assert_close(weights, torch.ones(8, 4), rtol=0, atol=0.01)  # small, but not falling


def test_one_width_for_each_item() -> None:
    with pytest.raises(ValueError, match="3 widths for 4 items"):
        AttentionWeighting(AttentionConfig(), items=ITEMS, widths=[2, 2, 2])

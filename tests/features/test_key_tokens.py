"""Key tokens against a loop: their order, ties, masks, and gradients of what is taken."""

from __future__ import annotations

import math

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor

from cmapkd.features.key_tokens import KeyTokensBy, key_token_indices, take_tokens

WAYS: tuple[KeyTokensBy, ...] = ("norm", "text", "class")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def score(token: Tensor, query: Tensor, by: KeyTokensBy) -> float:
    if by == "norm":
        return math.sqrt(dot(token, token))
    product = dot(token, query)
    return product if by == "class" else product / math.sqrt(dot(token, token) * dot(query, query))


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("k", [1, 4, 9, 30])
def test_the_best_tokens_in_their_order(by: KeyTokensBy, k: int) -> None:
    values, query = draw(3, 9, 4), draw(3, 4, seed=1)
    mask = torch.arange(9)[None] < torch.tensor([[9], [6], [2]])
    found = key_token_indices(values, k, by=by, query=None if by == "norm" else query, mask=mask)
    assert found.shape == (3, min(k, 9))
    for row in range(3):
        ranked = sorted(range(9), key=lambda n, row=row: (not mask[row, n], -score(values[row, n], query[row], by), n))
        real = [n for n in ranked if mask[row, n]]
        expected = (real + [n for n in range(9) if not mask[row, n]])[:k]
        assert found[row].tolist() == sorted(expected)


def test_of_equal_tokens_the_first_are_taken() -> None:
    values = torch.ones(1, 6, 3)
    values[0, 4] = 2
    assert key_token_indices(values, 3, by="norm").tolist() == [[0, 1, 4]]
    assert key_token_indices(torch.zeros(2, 6, 3), 2, by="norm").tolist() == [[0, 1]] * 2


def test_taken_tokens_and_their_gradient() -> None:
    values = draw(2, 5, 3).requires_grad_()
    indices = torch.tensor([[0, 3], [1, 2]])
    taken = take_tokens(values, indices)
    for row in range(2):
        for place in range(2):
            assert torch.equal(taken[row, place], values[row, indices[row, place]])
    taken.sum().backward()
    assert values.grad is not None
    expected = torch.zeros(2, 5, dtype=torch.bool).scatter(1, indices, True)
    assert torch.equal(values.grad != 0, expected[..., None].expand(2, 5, 3))
    assert not key_token_indices(values, 2, by="norm").requires_grad


def test_wrong_questions() -> None:
    values = draw(2, 5, 3)
    with pytest.raises(ValueError, match="k must be positive, got 0"):
        key_token_indices(values, 0, by="norm")
    with pytest.raises(ValueError, match="leave `query` out"):
        key_token_indices(values, 2, by="norm", query=draw(2, 3))
    with pytest.raises(ValueError, match=r"key tokens by text .* but it has none"):
        key_token_indices(values, 2, by="text")
    with pytest.raises(ValueError, match=r"query of shape \(2, 3\), but it has shape \(2, 4\)"):
        key_token_indices(values, 2, by="class", query=draw(2, 4))


def test_signatures_hold_the_shapes_that_are_passed() -> None:
    values, mask = draw(2, 5, 3).bfloat16(), torch.ones(2, 5, dtype=torch.bool)
    choose, take = (jaxtyped(typechecker=beartype)(function) for function in (key_token_indices, take_tokens))
    indices = choose(values, 2, by="text", query=draw(2, 3), mask=mask)
    assert take(values, indices).shape == (2, 2, 3)

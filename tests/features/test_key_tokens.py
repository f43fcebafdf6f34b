"""Key tokens against a loop: their order, ties, masks, and gradients of what is taken."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor

from cmapkd.features.key_tokens import KeyTokens, KeyTokensBy, key_token_indices, take_tokens
from cmapkd.features.pyramid import cells_at, pooled
from cmapkd.models import Features, Level, TowerFeatures

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


# ------------------------------------------------------------------------------------------------ of a model's levels


def features(*, prefix: int, mask: Tensor | None = None) -> Features:
    image = Level(draw(3, prefix + 6, 4), "tokens", prefix, (2, 3))
    text = Level(draw(3, 5, 4, seed=1), "tokens", mask=mask)
    towers = TowerFeatures(draw(3, 4, seed=2), {"i": image}), TowerFeatures(draw(3, 4, seed=3), {"t": text})
    return Features(*towers, torch.tensor(1.0))


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_levels_are_compared_with_their_class_token_or_their_mean(prefix: int) -> None:
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]])
    whole = features(prefix=prefix, mask=mask)
    found = KeyTokens(3).of(whole)
    level, values = found.image.levels["i"], whole.image.levels["i"].values
    cells = values[:, prefix:]
    assert level.grid == (2, 3)
    assert level.mask is None
    for row in range(3):
        query = values[row, 0] if prefix else cells[row].mean(0)
        order = sorted(range(6), key=lambda cell: -dot(cells[row, cell], query))
        assert level.places is not None
        assert level.places[row].tolist() == sorted(order[:3])
        assert torch.equal(level.values[row], cells[row, sorted(order[:3])])
    torch.testing.assert_close(pooled(level), cells.mean(1))
    words, of_text = found.text.levels["t"], whole.text.levels["t"]
    assert words.places is not None
    assert words.mask is not None
    assert words.mask.sum(1).tolist() == [3, 2, 3]
    assert words.places[1].tolist() == [0, 1, -1]
    assert not words.values[1, 2].any()
    torch.testing.assert_close(pooled(words), pooled(of_text))
    again = KeyTokens(1).of(found)  # reduced before: as it is
    assert again.image.levels["i"] is level


def test_by_text_needs_levels_as_wide_as_the_embedding() -> None:
    whole = features(prefix=1)
    found = KeyTokens(1, "text").of(whole).image.levels["i"]
    cells = whole.image.levels["i"].values[:, 1:]
    for row in range(3):
        best = max(range(6), key=lambda cell: score(cells[row, cell], whole.text.embedding[row], "text"))
        assert found.places is not None
        assert found.places[row].tolist() == [best]
    narrow = replace(whole, text=replace(whole.text, embedding=draw(3, 2)))
    with pytest.raises(ValueError, match="give the text's embedding in the tokens' width"):
        KeyTokens(1, "text").of(narrow)


@pytest.mark.parametrize(("own", "other"), [((3, 4), (3, 4)), ((3, 4), (5, 7)), ((6, 6), (2, 3)), ((1, 4), (4, 4))])
@pytest.mark.parametrize("layout", ["tokens", "map"])
def test_cells_at_the_centres_of_another_grid(own: tuple[int, int], other: tuple[int, int], layout: str) -> None:
    cells = draw(2, own[0] * own[1], 5)
    level = (
        Level(torch.cat([draw(2, 1, 5, seed=4), cells], 1), "tokens", 1, own)
        if layout == "tokens"
        else Level(cells.unflatten(1, own).permute(0, 3, 1, 2), "map", grid=own)
    )
    places = torch.tensor([[0, other[0] * other[1] - 1, other[1]], [1, 2, other[1] - 1]])
    centres = torch.stack([(places % other[1] + 0.5) / other[1], (places // other[1] + 0.5) / other[0]], -1)
    maps = cells.unflatten(1, own).permute(0, 3, 1, 2)
    expected = F.grid_sample(maps, (2 * centres.double() - 1)[:, None], padding_mode="border", align_corners=False)
    torch.testing.assert_close(cells_at(level, places, other), expected[:, :, 0].transpose(1, 2), rtol=1e-5, atol=1e-5)

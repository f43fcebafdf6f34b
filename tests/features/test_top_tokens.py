"""A teacher's likeliest tokens: taken, narrowed, stored in few bytes and read again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmapkd.features import StoredTokens, narrowed, pack, pack_states, top_tokens, unpack
from cmapkd.models.token_types import LogitHead

ROWS, TOKENS = 5, 40


def logits(spread: float = 4.0) -> Tensor:
    return torch.randn(ROWS, TOKENS, generator=torch.Generator().manual_seed(0)) * spread


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_likeliest_tokens_and_the_rest_are_those_of_the_softmax(temperature: float) -> None:
    top = top_tokens(logits(), 6, temperature=temperature)
    for i, row in enumerate(logits().tolist()):
        p = [math.exp(z / temperature) for z in row]
        p = [x / sum(p) for x in p]
        order = sorted(range(TOKENS), key=lambda token: -p[token])
        assert top.ids[i].tolist() == order[:6]
        assert top.log_p[i].tolist() == pytest.approx([math.log(p[token]) for token in order[:6]], rel=1e-5)
        assert float(top.rest[i]) == pytest.approx(math.log(sum(p[token] for token in order[6:])), rel=1e-4)


def test_all_tokens_leave_no_rest() -> None:
    top = top_tokens(logits(), TOKENS)
    assert (top.rest == -math.inf).all()
    torch.testing.assert_close(top.log_p.logsumexp(-1), torch.zeros(ROWS))
    assert (unpack(pack(logits(), TOKENS)).log_p.logsumexp(-1).abs() < 1e-5).all()


def test_fewer_of_more_tokens_are_those_taken_at_once() -> None:
    got, expected = narrowed(top_tokens(logits(), 20), 6), top_tokens(logits(), 6)
    assert got.ids.equal(expected.ids)
    torch.testing.assert_close(got.log_p, expected.log_p)
    torch.testing.assert_close(got.rest, expected.rest)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_stored_tokens_are_read_as_they_were_but_for_half_precision(temperature: float) -> None:
    stored = pack(logits(), 6, temperatures=(1.0, 3.0))
    got, expected = unpack(stored, temperature=temperature), top_tokens(logits(), 6, temperature=temperature)
    assert got.ids.equal(expected.ids)
    torch.testing.assert_close(got.rest, expected.rest)
    torch.testing.assert_close(got.log_p, expected.log_p, rtol=2**-10, atol=2e-3)
    total = torch.cat([got.log_p, got.rest[:, None]], -1).logsumexp(-1)
    torch.testing.assert_close(total, torch.zeros(ROWS))


def test_a_tiny_rest_is_kept_where_a_sum_of_rounded_probabilities_would_lose_it() -> None:
    peaked = torch.zeros(1, TOKENS)
    peaked[0, :2] = torch.tensor([40.0, 36.3])
    top = unpack(pack(peaked, 2))
    assert float(top.rest) == pytest.approx(math.log(38) - 40 - math.log1p(math.exp(-3.7)), rel=1e-4)


@pytest.mark.parametrize(("tokens", "id_bytes"), [(2**16, 2), (2**16 + 1, 4)])
def test_a_row_takes_the_bytes_that_its_docstring_says(tokens: int, id_bytes: int) -> None:
    stored = pack(torch.arange(float(tokens))[None], 16)
    assert sum(one.nbytes for one in (stored.ids, stored.gaps, stored.rest)) == 16 * (id_bytes + 2) + 4
    assert unpack(stored).ids[0, 0] == tokens - 1


def test_logits_far_below_the_largest_stay_finite() -> None:
    far = torch.tensor([[0.0, -1e6, -2e6]])
    assert pack(far, 3).gaps.isfinite().all()
    assert unpack(pack(far, 2)).log_p.isfinite().all()


def test_states_are_packed_in_chunks() -> None:
    draws = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(rows, 8, generator=draws).requires_grad_() for rows in (ROWS, TOKENS))
    head = LogitHead(weight, softcap=5.0)
    got, expected = pack_states(hidden, head, 4, chunk=2), pack(head(hidden), 4)
    assert isinstance(got, StoredTokens)
    assert got.ids.equal(expected.ids)
    torch.testing.assert_close((got.gaps, got.rest), (expected.gaps, expected.rest))


def test_what_cannot_be_taken_or_read_is_refused() -> None:
    with pytest.raises(ValueError, match="take 1 to 40"):
        top_tokens(logits(), 41)
    with pytest.raises(ValueError, match="temperatures must be positive"):
        pack(logits(), 3, temperatures=(1.0, 0.0))
    with pytest.raises(ValueError, match="write the cache again"):
        unpack(pack(logits(), 3), temperature=2.0)
    with pytest.raises(ValueError, match="take 1 to 3"):
        narrowed(top_tokens(logits(), 3), 4)

"""The decoder of a masked autoencoder: where tokens stand, what it sees, and sizes that are refused."""

from __future__ import annotations

import math

import pytest
import torch

from cmapkd.features.decoder import MaskedDecoder, sine_positions


def decoder(width: int = 32, depth: int = 1) -> MaskedDecoder:
    torch.manual_seed(0)
    return MaskedDecoder(width, (2, 3), 12, depth=depth)


@torch.no_grad()
def test_visible_tokens_stand_at_their_cells_and_one_token_at_all_others() -> None:
    made, keep = decoder(), torch.tensor([[1, 4], [0, 5]])
    tokens = torch.randn(2, 3, 32)  # a class token and two cells
    x = made.embed(made.norm(tokens))
    every = made.hidden.expand(2, 6, -1).clone()
    for sample in range(2):
        every[sample, keep[sample]] = x[sample, 1:]
    y = torch.cat([x[:, :1], every + made.positions], dim=1)
    for block in made.blocks:
        y = block(y)
    found = made(tokens, keep)
    assert found.shape == (2, 6, 12)
    torch.testing.assert_close(found, made.predict(made.norm_out(y[:, 1:])))


def test_positions_are_sines_of_rows_and_columns() -> None:
    positions = sine_positions((2, 3), 8)[0].view(2, 3, 8)
    for row in range(2):
        for column in range(3):
            expected = [
                f(place * rate) for place in (row, column) for f in (math.sin, math.cos) for rate in (1.0, 0.01)
            ]
            assert positions[row, column].tolist() == pytest.approx(expected, abs=1e-6)


def test_sizes() -> None:
    assert decoder(768).embed.out_features == 512  # as published
    assert decoder(64).embed.out_features == 32
    assert "positions" not in decoder().state_dict()
    for options in ({"inner_width": 40, "depth": 1}, {"depth": 0}):
        with pytest.raises(ValueError, match=r"give a depth of at least 1, and a width that is a multiple of 32"):
            MaskedDecoder(32, (2, 2), 12, **options)

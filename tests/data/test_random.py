"""Random numbers as pure functions: permutations of any length, uniform numbers, keys."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.random import Generator, Philox

from cmapkd.data.random import key_of, permuted, uniforms


def test_uniform_numbers_are_those_of_a_new_generator() -> None:
    """Whatever was drawn before, in whichever thread."""

    def drawn(number: int) -> list[list[float]]:
        return [uniforms(count, "a", number, count).tolist() for count in (0, 1, 9, 4, 1000, 2)]

    expected = [
        [Generator(Philox(key=key_of("a", number, count))).random(count).tolist() for count in (0, 1, 9, 4, 1000, 2)]
        for number in range(40)
    ]
    assert [drawn(number) for number in range(40)] == expected
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(drawn, range(40))] == expected


@pytest.mark.parametrize("length", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4096, 4097])
def test_permuted_is_a_permutation(length: int) -> None:
    result = permuted(np.arange(length), length, "order", 0)
    assert sorted(result.tolist()) == list(range(length))


def test_permutation_of_a_trillion() -> None:
    length = 10**12
    positions = np.unique(np.random.default_rng(0).integers(0, length, 20_000))
    result = permuted(positions, length, "order", 0)
    assert len(np.unique(result)) == len(positions)
    assert result.min() >= 0
    assert result.max() < length
    assert abs(result.mean() / length - 0.5) < 0.02


def test_any_part_is_the_part_of_the_whole() -> None:
    whole = permuted(np.arange(1000), 1000, "order", 3)
    np.testing.assert_array_equal(permuted(np.array([7, 999, 0]), 1000, "order", 3), whole[[7, 999, 0]])
    assert permuted(np.array([], dtype=np.int64), 5, "order").tolist() == []


def test_names_give_different_permutations() -> None:
    orders = {tuple(permuted(np.arange(50), 50, "order", seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize("length", [5, 10, 37])
def test_every_place_is_reached_equally_often(length: int) -> None:
    draws, places = 1000, np.arange(length)
    counts = np.zeros((length, length))
    for name in range(draws):
        counts[places, permuted(places, length, name)] += 1
    expected = draws / length
    chi_square = ((counts - expected) ** 2 / expected).sum(1)
    # mean length - 1, variance 2 (length - 1): five standard deviations
    assert (chi_square < length - 1 + 5 * np.sqrt(2 * (length - 1))).all()


def test_neighbours_do_not_stay_neighbours() -> None:
    result = permuted(np.arange(100_000), 100_000, "order", 1)
    assert abs(np.corrcoef(result[:-1], result[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), result)[0, 1]) < 0.02


@pytest.mark.parametrize(("positions", "length"), [([5], 5), ([-1], 5), ([0], 0)])
def test_positions_outside_are_refused(positions: list[int], length: int) -> None:
    with pytest.raises(ValueError, match="positions must lie in"):
        permuted(np.array(positions), length, "order")


def test_pinned_values() -> None:
    """A change here changes every run's order of samples: it needs a note in the changelog."""
    assert permuted(np.arange(8), 100, "order", 0, 0).tolist() == [82, 37, 25, 53, 61, 78, 11, 96]
    expected = [0.5761033919204711, 0.2825250645890546, 0.2649494585917612]
    np.testing.assert_array_equal(uniforms(3, "view", "a", 0), expected)


def test_uniforms_are_uniform_and_pure() -> None:
    values = uniforms(20_000, "x")
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 19 + 5 * np.sqrt(2 * 19)
    np.testing.assert_array_equal(values, uniforms(20_000, "x"))
    np.testing.assert_array_equal(values[:10], uniforms(10, "x"))


def test_keys_do_not_run_together() -> None:
    keys = {key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of("a", "b", "c"), key_of(1, 23), key_of(12, 3)}
    assert len(keys) == 6
    assert all(0 <= key < 2**128 for key in keys)

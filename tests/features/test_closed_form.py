"""Moments, class means, directions, clusters and neighbours, against loops and formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmapkd.features.closed_form import (
    RunningMoments,
    class_means,
    dispersion,
    nearest_others,
    principal_directions,
    rank_in_class,
    spherical_kmeans,
)


def rows(number: int, dim: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_are_those_of_all_parts() -> None:
    x = rows(23) + 1000  # far from zero, where sums of squares would lose digits
    moments = RunningMoments(5)
    for part in (x[:1], x[1:1], x[1:9], x[9:]):
        moments.add(part)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.covariance, torch.cov(x.T, correction=0), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="no rows have been added"):
        _ = RunningMoments(2).covariance


def test_class_means_are_the_loop() -> None:
    x, labels = rows(12), torch.tensor([2, 0, -1, 2, 2, 0, 3, -1, 2, 0, 3, 2])
    assert rank_in_class(labels).tolist() == [labels[:i].tolist().count(label) for i, label in enumerate(labels)]
    for most in (None, 2):
        means, counts = class_means(x, labels, 5, most=most)
        for label in range(5):
            own = x[labels == label][:most]
            assert int(counts[label]) == len(own)
            torch.testing.assert_close(means[label], own.mean(0) if len(own) else torch.zeros(5).double())
    with pytest.raises(ValueError, match="label 3, but only 3 classes"):
        class_means(x, labels, 3)


def test_directions_are_the_singular_vectors() -> None:
    x = rows(30) * torch.tensor([3.0, 0.1, 1.0, 2.0, 0.5])
    found, variances = principal_directions(x, 3)
    _, values, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(variances, values[:3].square() / 30)
    torch.testing.assert_close((found * vectors[:3]).sum(1).abs(), torch.ones(3).double())
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()
    with pytest.raises(ValueError, match="6 directions are asked for, and the rows have width 5"):
        principal_directions(x, 6)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kmeans_finds_separate_bundles_and_ends_at_a_fixed_point() -> None:
    bundles = normalize(rows(4, 6, seed=1), dim=-1)
    x = (bundles[torch.arange(40) % 4] + 0.02 * rows(40, 6)) * torch.rand(40, 1, dtype=torch.float64).add(0.1)
    centres, clusters = spherical_kmeans(x, 4, generator=drawn())
    for bundle in range(4):
        assert len(set(clusters[bundle::4].tolist())) == 1
    assert len(set(clusters.tolist())) == 4
    units = normalize(x, dim=-1)
    for number in range(4):
        torch.testing.assert_close(centres[number], normalize(units[clusters == number].mean(0), dim=0))
    assert torch.equal(clusters, (units @ centres.T).argmax(1))
    again = spherical_kmeans(x, 4, generator=drawn())
    assert torch.equal(again[0], centres)


def test_kmeans_of_every_row_and_of_equal_rows() -> None:
    x = rows(7)
    centres, clusters = spherical_kmeans(x, 7, generator=drawn())
    assert sorted(clusters.tolist()) == list(range(7))
    torch.testing.assert_close(centres[clusters], normalize(x, dim=-1))
    same, _ = spherical_kmeans(torch.ones(5, 3), 3, generator=drawn())
    torch.testing.assert_close(same, torch.full((3, 3), 1 / math.sqrt(3)))
    with pytest.raises(ValueError, match="8 clusters are asked for, and there are 7 rows"):
        spherical_kmeans(x, 8, generator=drawn())


def test_kmeans_begins_by_squared_distance() -> None:
    """Three of four rows are one: the second centre is always the fourth, or the first was."""
    x = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    for seed in range(8):
        assert spherical_kmeans(x, 2, generator=drawn(seed))[1].unique().numel() == 2


def test_neighbours_are_the_loop() -> None:
    queries, entries = rows(6), rows(9, seed=1)
    own, keys = torch.tensor([0, 1, 2, 3, 8, 8]), torch.tensor([0, 1, 1, 2, 3, 4, 5, 8, 8])
    expected = []
    for query, key in zip(normalize(queries, dim=-1), own.tolist(), strict=True):
        others = [i for i, entry in enumerate(keys.tolist()) if entry != key]
        expected.append(max(others, key=lambda i, query=query: float(query @ normalize(entries[i], dim=0))))
    for chunk in (1, 4, 100):
        assert nearest_others(queries, entries, query_keys=own, entry_keys=keys, chunk=chunk).tolist() == expected
    alone = nearest_others(queries[:1], entries[:1], query_keys=own[:1], entry_keys=keys[:1])
    assert alone.tolist() == [-1]


def test_avoided_entries_and_duplicates_are_neighbours_of_last_resort() -> None:
    entries = torch.tensor([[1.0, 0.0], [1.0, 0.001], [0.8, 0.6], [0.0, 1.0]])
    avoided = torch.tensor([[False, False, True, False]])
    for chunk in (1, 100):

        def nearest(number: int, chunk: int = chunk, **options: Any) -> int:
            some, names = entries[:number], torch.arange(number)
            own = torch.tensor([0])
            return int(
                nearest_others(entries[:1], some, query_keys=own, entry_keys=names, chunk=chunk, **options).item()
            )

        assert nearest(4) == 1
        assert nearest(4, duplicates_above=0.999) == 2
        assert nearest(4, duplicates_above=0.999, avoided=avoided) == 3
        assert nearest(2, duplicates_above=0.999) == 1


def test_dispersion_is_the_mean_squared_angle() -> None:
    x = rows(8) + 2
    middle = normalize(x.mean(0), dim=0)
    angles = [math.acos(float(normalize(row, dim=0) @ middle)) for row in x]
    assert float(dispersion(x)) == pytest.approx(sum(angle**2 for angle in angles) / 8, rel=1e-12)
    assert float(dispersion(torch.ones(3, 4))) == pytest.approx(0, abs=1e-15)
    for wrong, message in ((torch.zeros(0, 3), "no rows"), (torch.tensor([[1.0, 0], [-1, 0]]), "mean row is zero")):
        with pytest.raises(ValueError, match=message):
            dispersion(wrong)

"""Moments, class means, directions, clusters and neighbours, against loops and formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import normalize

from cmapkd.features.closed_form import (
    RunningMoments,
    class_means,
    class_parts,
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


def test_kmeans_is_a_fixed_point_of_separate_bundles_and_keeps_empty_centres() -> None:
    x = torch.cat([5 * torch.eye(8, dtype=torch.float64)[n] + 0.1 * rows(9, 8) for n in range(4)])
    centres = spherical_kmeans(x, 4, drawn())
    units = F.normalize(x, dim=-1)
    clusters = (units @ centres.T).argmax(1)
    for number in clusters.unique().tolist():
        torch.testing.assert_close(centres[number], F.normalize(units[clusters == number].mean(0), dim=0))
    torch.testing.assert_close(spherical_kmeans(3 * x, 4, drawn()), centres)
    same = spherical_kmeans(torch.ones(5, 3), 3, drawn())  # all rows belong to the first
    torch.testing.assert_close(same, F.normalize(torch.ones(3, 3), dim=-1))


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


def test_random_parts_of_a_class_do_not_point_at_the_mean_of_all_rows() -> None:
    x = rows(400, dim=40) + 3.0  # their mean is 19 long, they differ by 6 from it
    found, _ = class_parts(
        x,
        torch.zeros(400, dtype=torch.long),
        1,
        common=(torch.eye(40, dtype=torch.float64)[:4], torch.ones(4, dtype=torch.float64)),
        random=True,
        generator=torch.Generator().manual_seed(0),
    )
    basis = torch.linalg.qr(found[0].T).Q
    share = float((basis.T @ normalize(x.mean(0), dim=0)).square().sum())
    assert share < 0.4  # of four directions in forty, a tenth is expected

"""Taps: which blocks and stages are the pyramid's and the hierarchy's levels, for every depth."""

from __future__ import annotations

import pytest
import torch

from cmapkd.features.taps import (
    language_groups,
    language_taps,
    tapped,
    tapped_groups,
    visual_groups,
    visual_taps,
)
from cmapkd.models.types import Level, LevelInfo


def blocks(depth: int) -> list[LevelInfo]:
    return [LevelInfo(f"blocks.{n}", 8, "tokens") for n in range(depth)]


def stages(count: int) -> list[LevelInfo]:
    return [LevelInfo(f"stages.{n}", 8 * 2**n, "map") for n in range(count)]


def numbers(taps: dict[str, LevelInfo]) -> list[int]:
    return [int(info.name.split(".")[1]) for info in taps.values()]


def test_groups_of_the_design() -> None:
    assert {name: info.name for name, info in visual_taps(blocks(12)).items()} == {
        "P2": "blocks.2",  # blocks 1-3, counted from one
        "P3": "blocks.7",  # 4-8
        "P4": "blocks.11",  # 9-12
    }
    assert numbers(visual_taps(blocks(24))) == [5, 15, 23]
    assert {name: info.name for name, info in language_taps(blocks(12)).items()} == {
        "L1": "blocks.3",
        "L2": "blocks.7",
        "L3": "blocks.11",
    }


@pytest.mark.parametrize("depth", range(1, 25))
def test_groups_of_any_depth(depth: int) -> None:
    for taps, shares in ((visual_taps(blocks(depth)), (3, 8, 12)), (language_taps(blocks(depth)), (4, 8, 12))):
        ends = [number + 1 for number in numbers(taps)]
        assert ends[-1] == depth
        assert ends == sorted(ends)
        assert ends[0] >= 1
        if depth >= 3:
            assert len(set(ends)) == 3
            assert all(abs(end - depth * share / 12) <= 0.5 for end, share in zip(ends, shares, strict=True))


def test_stages_of_convolutional_towers() -> None:
    assert numbers(visual_taps(stages(4))) == [0, 1, 2]
    assert numbers(visual_taps(stages(5))) == [1, 2, 3]
    assert numbers(visual_taps(stages(3))) == [0, 1, 2]
    assert numbers(visual_taps(stages(1))) == [0, 0, 0]


@pytest.mark.parametrize("depth", range(3, 25))
def test_groups_hold_every_block_once_and_end_where_taps_are(depth: int) -> None:
    for groups, taps in (
        (visual_groups(blocks(depth)), visual_taps(blocks(depth))),
        (language_groups(blocks(depth)), language_taps(blocks(depth))),
    ):
        assert [info for group in groups.values() for info in group] == blocks(depth)
        assert {name: group[-1] for name, group in groups.items()} == taps


def test_groups_of_short_and_of_convolutional_towers() -> None:
    assert [[info.name for info in group] for group in visual_groups(blocks(2)).values()] == [
        ["blocks.0"],
        ["blocks.0"],
        ["blocks.1"],
    ]
    assert [[info.name for info in group] for group in visual_groups(stages(5)).values()] == [
        ["stages.1"],
        ["stages.2"],
        ["stages.3"],
    ]


def test_a_group_read_as_its_mean() -> None:
    draws = torch.Generator().manual_seed(0)
    levels = {f"blocks.{n}": Level(torch.randn(2, 4, 8, generator=draws), "tokens", grid=(2, 2)) for n in range(12)}
    merged = tapped_groups(visual_groups(blocks(12)), levels)
    for name, (first, last) in {"P2": (0, 3), "P3": (3, 8), "P4": (8, 12)}.items():
        expected = sum(levels[f"blocks.{n}"].values for n in range(first, last)) / (last - first)
        torch.testing.assert_close(merged[name].values, expected)
        assert merged[name].grid == (2, 2)


def test_maps_of_equal_blocks_count_as_blocks() -> None:
    maps = [LevelInfo(f"blocks.{n}", 8, "map") for n in range(12)]
    assert numbers(visual_taps(maps)) == [2, 7, 11]


def test_levels_of_a_tower_by_their_pyramid_names() -> None:
    first, second = Level(torch.zeros(1, 4, 8), "tokens"), Level(torch.ones(1, 4, 8), "tokens")
    levels = tapped(visual_taps(blocks(2)), {"blocks.0": first, "blocks.1": second})
    assert levels == {"P2": first, "P3": first, "P4": second}


def test_a_tower_without_levels() -> None:
    with pytest.raises(ValueError, match=r"image tower exposes no intermediate level.*P2, P3, P4"):
        visual_taps([])
    with pytest.raises(ValueError, match=r"text tower exposes no intermediate level.*L1, L2, L3"):
        language_taps([])

"""Which of a tower's levels are the pyramid's P2, P3, P4 and the hierarchy's L1, L2, L3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator

from cmapkd.config import closest
from cmapkd.models.types import Level, LevelInfo

Depths = Literal["last", "mean"]
"""What a depth group gives: its last block's output, or the mean over its blocks'."""

VISUAL_LEVELS = ("P2", "P3", "P4", "P5")
LANGUAGE_LEVELS = ("L1", "L2", "L3", "L4")
"""Fine to coarse. P5 and L4 are the embeddings of the joint space: they are not tapped."""


def _share_or_name(value: str | float) -> str | float:
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"{value:g} is no share of the depth: give a number in (0, 1], or a level's name")
    return value


Layer = Annotated[str | float, AfterValidator(_share_or_name)]
"""A setting that names one level of a tower, see `level_at`: its own name, or a share of the depth."""

_VISUAL_SHARES = (3, 5, 4)  # blocks of twelve: shallow, middle, deep
_LANGUAGE_SHARES = (4, 4, 4)


def visual_taps(levels: Sequence[LevelInfo]) -> dict[str, LevelInfo]:
    """P2, P3 and P4 of an image tower: the last level of each of `visual_groups`.

    Args:
        levels: `DualEncoder.image_levels`, shallow to deep.
    Returns:
        P2, P3, P4, in that order.
    Raises:
        ValueError: the tower exposes no level.
    """
    return {name: group[-1] for name, group in visual_groups(levels).items()}


def language_taps(levels: Sequence[LevelInfo]) -> dict[str, LevelInfo]:
    """L1, L2 and L3 of a text tower: the last level of each of `language_groups`.

    Args:
        levels: `DualEncoder.text_levels`, shallow to deep.
    Returns:
        L1, L2, L3, in that order.
    Raises:
        ValueError: the tower exposes no level.
    """
    return {name: group[-1] for name, group in language_groups(levels).items()}


def visual_groups(levels: Sequence[LevelInfo]) -> dict[str, tuple[LevelInfo, ...]]:
    """The levels of an image tower that are P2, P3 and P4, each group shallow to deep.

    Blocks fall into depth groups of 3 : 5 : 4 in twelve; the last group ends at the last block. A tower of one or two
    blocks repeats one of them. Convolutional `stages` are counted from the deepest, which P5 pools: P4 is the one
    before it, then P3, then P2, the finest. So of four stages they are the first three, and a stem or a half-size
    stage in front is skipped. Three stages or fewer are grouped as blocks are.

    Raises:
        ValueError: the tower exposes no level.
    """
    _check_any(levels, "image", VISUAL_LEVELS[:3])
    if levels[0].name.startswith("stages."):
        stages = levels[-4:-1] if len(levels) > 3 else [group[-1] for group in _groups(_VISUAL_SHARES, levels)]
        return {name: (stage,) for name, stage in zip(VISUAL_LEVELS, stages, strict=False)}  # widths differ: no mean
    return dict(zip(VISUAL_LEVELS, _groups(_VISUAL_SHARES, levels), strict=False))


def language_groups(levels: Sequence[LevelInfo]) -> dict[str, tuple[LevelInfo, ...]]:
    """The levels of a text tower that are L1, L2 and L3: three equal depth groups, each shallow to deep.

    Raises:
        ValueError: the tower exposes no level.
    """
    _check_any(levels, "text", LANGUAGE_LEVELS[:3])
    return dict(zip(LANGUAGE_LEVELS, _groups(_LANGUAGE_SHARES, levels), strict=False))


def level_at(levels: Sequence[LevelInfo], where: str | float, *, tower: str) -> LevelInfo:
    """One level of a tower: by its own name, or the one that ends nearest to a share of the depth.

    Args:
        levels: `DualEncoder.image_levels` or `text_levels`, shallow to deep.
        where: a name (`blocks.3`), or a share in (0, 1] (0.5: half way).
        tower: `image` or `text`, for messages.
    Raises:
        ValueError: the tower exposes no level, or none of this name.
    """
    if not levels:
        raise ValueError(
            f"the {tower} tower exposes no intermediate level, and one is to be compared: choose another tower, or "
            "leave this level out of the method's settings"
        )
    if not isinstance(where, str):
        return levels[max(1, round(where * len(levels))) - 1]
    known = {level.name: level for level in levels}
    if where not in known:
        raise ValueError(f"there is no {tower} level {where!r}{closest(where, known)}; known: {', '.join(known)}")
    return known[where]


def tapped(taps: Mapping[str, LevelInfo], levels: Mapping[str, Level]) -> dict[str, Level]:
    """A tower's own levels (`blocks.3`) under the names of the pyramid (`P2`); two names may share one level."""
    return {name: levels[info.name] for name, info in taps.items()}


def tapped_groups(groups: Mapping[str, Sequence[LevelInfo]], levels: Mapping[str, Level]) -> dict[str, Level]:
    """The same for groups: the mean of each group's levels, place by place."""
    return {name: _mean([levels[info.name] for info in group]) for name, group in groups.items()}


def _mean(levels: Sequence[Level]) -> Level:
    if len(levels) == 1:
        return levels[0]
    values = torch.stack([level.values for level in levels]).mean(0)
    means = [level.mean for level in levels if level.mean is not None]
    return replace(levels[-1], values=values, mean=torch.stack(means).mean(0) if means else None)


def _groups(shares: Sequence[int], levels: Sequence[LevelInfo]) -> list[tuple[LevelInfo, ...]]:
    """The group that ends after `share` of the depth ends at the nearest whole block, and never before the first."""
    depth, total = len(levels), sum(shares)
    groups: list[tuple[LevelInfo, ...]] = []
    start = 0
    for number in range(len(shares)):
        until = sum(shares[: number + 1])
        end = max(1, (2 * depth * until + total) // (2 * total))
        groups.append(tuple(levels[min(start, end - 1) : end]))  # at least the block it ends with
        start = end
    return groups


def _check_any(levels: Sequence[LevelInfo], tower: str, names: Sequence[str]) -> None:
    if not levels:
        raise ValueError(
            f"the {tower} tower exposes no intermediate level, so {', '.join(names)} cannot be tapped: leave these "
            "levels out, use a method of embeddings, or choose another tower."
        )

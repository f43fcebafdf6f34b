"""The visual pyramid: grids of patch features, the same size for both models, the student's projected.

The teacher's side has no parameters: it is deterministic, can be cached, and cannot drift towards the student.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cmapkd.features.taps import VISUAL_LEVELS
from cmapkd.models.types import Features, Level, LevelInfo, TowerFeatures

Grid = tuple[int, int]  # rows, columns


def grid_of(level: Level) -> Grid:
    """Rows and columns of a level's patches or map cells.

    Raises:
        ValueError: the level has no grid (a text), or one that its number of tokens contradicts.
    """
    if level.layout == "map":
        return level.values.shape[-2], level.values.shape[-1]
    patches = level.values.shape[1] - level.num_prefix
    if level.grid is None or level.grid[0] * level.grid[1] != patches:
        raise ValueError(
            f"a level of {level.values.shape[1]} tokens, {level.num_prefix} of them prefix, has grid {level.grid}: "
            f"its {patches} patches must be rows x columns. Texts have no grid: use the language hierarchy for them."
        )
    return level.grid


def level_grid(level: Level, size: Grid | None = None) -> Float[Tensor, "batch cells width"]:
    """A level's cells row by row, without prefix tokens, on a grid of `size`; None keeps its own."""
    return resample(cells_of(level), grid_of(level), size or grid_of(level))


def cells_at(level: Level, places: Int[Tensor, "batch places"], grid: Grid) -> Float[Tensor, "batch places width"]:
    """A level's cells where the cells `places` of another grid over the same picture have their centres.

    Bilinear, without aligned corners; the cells themselves where the grids are the same.
    """
    cells, level_size = cells_of(level), grid_of(level)

    def at(numbers: Int[Tensor, "batch places"]) -> Float[Tensor, "batch places width"]:
        return cells.gather(1, numbers[..., None].expand(-1, -1, cells.shape[-1]))

    if level_size == grid:
        return at(places)
    axes: list[tuple[Tensor, Tensor, Tensor]] = []  # for rows and columns: index before, index after, weight of after
    for numbers, axis in ((places // grid[1], 0), (places % grid[1], 1)):
        centres = ((numbers + 0.5) * (level_size[axis] / grid[axis]) - 0.5).clamp(0, level_size[axis] - 1)
        before = centres.floor()
        after = (before + 1).clamp_max(level_size[axis] - 1)
        axes.append((before.long(), after.long(), (centres - before)[..., None].to(cells.dtype)))
    (top, bottom, down), (left, right, across) = axes
    upper = torch.lerp(at(top * level_size[1] + left), at(top * level_size[1] + right), across)
    lower = torch.lerp(at(bottom * level_size[1] + left), at(bottom * level_size[1] + right), across)
    return torch.lerp(upper, lower, down)


def resample(
    values: Float[Tensor, "batch cells width"], grid: Grid, size: Grid
) -> Float[Tensor, "batch other_cells width"]:
    """Cells of `grid`, row by row, to those of `size`: means of areas where an axis shrinks, bilinear where it grows.

    Both are weighted means of cells, so a linear map of the channels may as well come first. Bilinear is without
    aligned corners. Beyond the patch grid it adds cost and no information.
    """
    if size == grid:
        return values
    maps: Tensor = values.unflatten(1, grid).permute(0, 3, 1, 2)
    smaller = min(size[0], grid[0]), min(size[1], grid[1])
    if smaller != grid:
        maps = F.adaptive_avg_pool2d(maps, smaller)
    if smaller != size:
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def standardise(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """Each token's channels to mean 0 and variance 1 (layer norm without affine); float32 or wider."""
    standardised: Tensor = F.layer_norm(x.to(_wide_dtype(x)), x.shape[-1:], eps=1e-6)
    return standardised


def pooled(level: Level) -> Float[Tensor, "batch width"]:
    """Mean over patches, map cells or real tokens; prefix tokens and padding do not count. float32 or wider.

    A text without a single real token gives zeros. A level that carries its mean (`Level.mean`) gives that one.
    """
    if level.mean is not None:
        return level.mean
    cells = cells_of(level)
    if level.mask is None:
        return cells.mean(1, dtype=_wide_dtype(cells))
    return masked_mean(cells, level.mask[:, level.num_prefix :])


def with_means(features: Features) -> Features:
    """The same features, each level with its mean: `pooled` then takes no time, however many terms ask for it."""

    def pooled_once(tower: TowerFeatures) -> TowerFeatures:
        levels = {name: replace(level, mean=pooled(level)) for name, level in tower.levels.items()}
        return replace(tower, levels=levels)

    return replace(features, image=pooled_once(features.image), text=pooled_once(features.text))


def masked_mean(
    values: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    """Mean over the tokens where `mask` holds, zeros where it nowhere does; float32 or wider."""
    real = values.masked_fill(~mask[..., None], 0)
    return real.sum(1, dtype=_wide_dtype(values)) / mask.sum(1, keepdim=True).clamp_min(1)


def scaled_grid(patch_grid: Grid, factor: float) -> Grid:
    """`factor` times the rows and columns, at least one of each.

    Raises:
        ValueError: the factor is not positive.
    """
    if factor <= 0:
        raise ValueError(f"a grid's scale factor must be positive, got {factor}")
    return max(1, round(patch_grid[0] * factor)), max(1, round(patch_grid[1] * factor))


def target_grids(levels: Mapping[str, Level], scales: Literal["native"] | Mapping[str, float]) -> dict[str, Grid]:
    """The grid on which both models meet, for each of the student's levels.

    Args:
        levels: the student's, by pyramid name.
        scales: `native` keeps the student's own grid at every level; else factors of its patch grid, by pyramid name
            (the original design: P2 4, P3 2, P4 1). A level without a factor keeps its own grid. A convolutional tower
            has no patches: there the grid of P4, which has a ViT/16's stride, counts as the patch grid.
    Raises:
        ValueError: a factor is not positive, or there is no patch grid to scale.
    """
    native = {name: grid_of(level) for name, level in levels.items()}
    factors = {} if scales == "native" else {name: scales[name] for name in native if name in scales}
    if not factors:
        return native
    patches = native.get("P4") or next((native[name] for name in native if levels[name].layout == "tokens"), None)
    if patches is None:
        raise ValueError(
            f"scale factors for {', '.join(factors)} of a convolutional student are factors of P4's grid, and P4 is "
            "not among the levels: add it, or use native grids."
        )
    return native | {name: scaled_grid(patches, factor) for name, factor in factors.items()}


def teacher_grids(
    levels: Mapping[str, Level], grids: Mapping[str, Grid]
) -> dict[str, Float[Tensor, "batch cells width"]]:
    """The teacher's side of the pyramid: resampled, standardised, detached; float32 or wider. No parameters.

    Args:
        levels: the teacher's, by pyramid name.
        grids: of `target_grids`; levels without one are an error, grids without a level are not read.
    """
    check_known(levels, grids, "target grid")
    return {name: standardise(level_grid(level, grids[name]).detach()) for name, level in levels.items()}


class VisualProjectors(nn.Module):
    """The student's side of the pyramid: a linear map to the teacher's width at each level.

    With `top_down` a feature pyramid (Lin et al. 2017, arXiv:1612.03144, section 3): levels are mapped to a common
    width, each coarser one is resampled and added to the next finer one, and a 3 x 3 convolution smooths the sum into
    the teacher's width. Levels not given to `forward` take no part, so stages can switch them off.
    """

    def __init__(
        self,
        student: Mapping[str, LevelInfo],
        teacher: Mapping[str, LevelInfo],
        *,
        top_down: bool = False,
        top_down_width: int = 256,
    ) -> None:
        """Projectors for the levels of two `visual_taps`; `top_down_width` is in channels, that paper's by default.

        Raises:
            ValueError: the two have not the same levels.
        """
        super().__init__()
        check_same_levels(student, teacher)
        widths = {name: (student[name].width, teacher[name].width) for name in student}
        inner = {name: top_down_width if top_down else end for name, (_, end) in widths.items()}
        self.lateral = nn.ModuleDict({name: nn.Linear(start, inner[name]) for name, (start, _) in widths.items()})
        self.smooth = nn.ModuleDict(
            {name: nn.Conv2d(inner[name], end, 3, padding=1) for name, (_, end) in widths.items()} if top_down else {}
        )

    def forward(
        self, levels: Mapping[str, Level], grids: Mapping[str, Grid]
    ) -> dict[str, Float[Tensor, "batch cells teacher_width"]]:
        """The student's levels on their grids in the teacher's width, not standardised.

        Args:
            levels: the student's, by pyramid name; any part of those that there are projectors for.
            grids: of `target_grids`.
        Raises:
            ValueError: a level has no projector or no grid.
        """
        check_known(levels, self.lateral, "projector")
        check_known(levels, grids, "target grid")
        mapped = {name: self._lateral(name, level, grids[name]) for name, level in levels.items()}
        return self._top_down(mapped, grids) if len(self.smooth) else mapped

    def map_cells(
        self, cells: Mapping[str, Float[Tensor, "batch places width"]]
    ) -> dict[str, Float[Tensor, "batch places teacher_width"]]:
        """Cells taken from the student's levels, by pyramid name, to the teacher's width; without a top-down path."""
        return {name: self.lateral[name](values) for name, values in cells.items()}

    def _lateral(self, name: str, level: Level, size: Grid) -> Float[Tensor, "batch cells teacher_width"]:
        """Linear map and resampling commute: the map comes where there are fewer cells."""
        grid = grid_of(level)
        if size[0] * size[1] > grid[0] * grid[1]:
            return resample(self.lateral[name](cells_of(level)), grid, size)
        projected: Tensor = self.lateral[name](level_grid(level, size))
        return projected

    def _top_down(self, mapped: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> dict[str, Tensor]:
        done: dict[str, Tensor] = {}
        above: tuple[Tensor, Grid] | None = None
        for name in sorted(mapped, key=VISUAL_LEVELS.index, reverse=True):
            grid, merged = grids[name], mapped[name]
            if above is not None:
                merged = merged + resample(*above, grid)
            above = merged, grid
            smoothed = self.smooth[name](merged.unflatten(1, grid).permute(0, 3, 1, 2))
            done[name] = smoothed.permute(0, 2, 3, 1).flatten(1, 2)
        return {name: done[name] for name in mapped}


def check_same_levels(student: Iterable[str], teacher: Iterable[str]) -> None:
    """Refuses projectors between different sets of levels.

    Raises:
        ValueError: names both.
    """
    if set(student) != set(teacher):
        raise ValueError(
            f"the student has levels {', '.join(student)}, the teacher {', '.join(teacher)}: each is compared with "
            "the teacher's of the same name, so give both the same levels."
        )


def check_known(levels: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuses levels for which there is no `what`.

    Raises:
        ValueError: names them and the levels that are known.
    """
    known = tuple(known)
    unknown = [name for name in levels if name not in known]
    if unknown:
        raise ValueError(f"no {what} for level {', '.join(unknown)}; there is one for {', '.join(known) or 'none'}")


def cells_of(level: Level) -> Float[Tensor, "batch cells width"]:
    """Patches or map cells row by row, without prefix tokens."""
    if level.layout == "map":
        return level.values.flatten(2).transpose(1, 2)
    return level.values[:, level.num_prefix :]


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

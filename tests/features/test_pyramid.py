"""The visual pyramid against slow loops: grids, resampling, standardising, projecting, and what gradients reach."""

from __future__ import annotations

import math

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor

from cmapkd.features import pyramid
from cmapkd.features.pyramid import (
    VisualProjectors,
    grid_of,
    level_grid,
    masked_mean,
    pooled,
    resample,
    scaled_grid,
    standardise,
    target_grids,
    teacher_grids,
)
from cmapkd.models.types import Level, LevelInfo

BATCH, WIDTH, TEACHER_WIDTH = 2, 5, 7
# tokens: (prefix, grid)
TOWERS = {37: (1, (6, 6)), 50: (1, (7, 7)), 197: (1, (14, 14)), 257: (1, (16, 16)), 40: (5, (7, 5)), 36: (0, (4, 9))}


def tokens(count: int, *, width: int = WIDTH, seed: int = 0, dtype: torch.dtype = torch.float64) -> Level:
    prefix, grid = TOWERS[count]
    draws = torch.Generator().manual_seed(seed)
    return Level(torch.randn(BATCH, count, width, generator=draws, dtype=dtype), "tokens", prefix, grid)


def maps(grid: tuple[int, int], *, width: int = WIDTH, seed: int = 0) -> Level:
    draws = torch.Generator().manual_seed(seed)
    return Level(torch.randn(BATCH, width, *grid, generator=draws, dtype=torch.float64), "map", grid=grid)


def infos(width: int, *names: str) -> dict[str, LevelInfo]:
    return {name: LevelInfo(f"blocks.{n}", width, "tokens") for n, name in enumerate(names)}


def axis_weights(source: int, target: int) -> list[list[float]]:
    """Row i: how much each source cell counts in target cell i. Means of areas, or linear between cell centres."""
    rows = []
    for i in range(target):
        row = [0.0] * source
        if target <= source:
            first, last = math.floor(i * source / target), math.ceil((i + 1) * source / target)
            for j in range(first, last):
                row[j] += 1 / (last - first)
        else:
            centre = max(0.0, (i + 0.5) * source / target - 0.5)
            low = min(int(centre), source - 1)
            high = min(low + 1, source - 1)
            row[low] += 1 - (centre - low)
            row[high] += centre - low
        rows.append(row)
    return rows


def resampled(cells: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[cells, width] of one sample, in loops."""
    rows, columns = axis_weights(grid[0], size[0]), axis_weights(grid[1], size[1])
    out = torch.zeros(size[0] * size[1], cells.shape[1], dtype=cells.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            for r in range(grid[0]):
                for c in range(grid[1]):
                    out[i * size[1] + j] += rows[i][r] * columns[j][c] * cells[r * grid[1] + c]
    return out


@pytest.mark.parametrize("count", TOWERS)
def test_grids_of_token_towers_leave_prefix_tokens_out(count: int) -> None:
    level = tokens(count)
    prefix, grid = TOWERS[count]
    assert grid_of(level) == grid
    assert torch.equal(level_grid(level), level.values[:, prefix:])
    assert torch.equal(level_grid(level, grid), level.values[:, prefix:])
    torch.testing.assert_close(pooled(level), torch.stack([sample[prefix:].mean(0) for sample in level.values]))


def test_grids_of_maps_run_row_by_row() -> None:
    level = maps((3, 4))
    assert grid_of(level) == (3, 4)
    for r in range(3):
        for c in range(4):
            assert torch.equal(level_grid(level)[:, 4 * r + c], level.values[:, :, r, c])
    torch.testing.assert_close(pooled(level), level.values.mean((2, 3)))


@pytest.mark.parametrize("size", [(3, 2), (7, 5), (14, 10), (1, 1), (4, 8), (9, 3), (7, 2), (11, 5)])
def test_resampling_written_out(size: tuple[int, int]) -> None:
    level = tokens(40)
    expected = torch.stack([resampled(sample[5:], (7, 5), size) for sample in level.values])
    torch.testing.assert_close(level_grid(level, size), expected)


def test_resampling_keeps_constants_and_commutes_with_linear_maps() -> None:
    level, linear = tokens(40), torch.nn.Linear(WIDTH, 3).double()
    for size in ((3, 8), (14, 10), (2, 2)):
        constant = Level(torch.full((1, 35, 2), 3.0), "tokens", 0, (7, 5))
        torch.testing.assert_close(level_grid(constant, size), torch.full((1, size[0] * size[1], 2), 3.0))
        before = resample(linear(level_grid(level)), (7, 5), size)
        torch.testing.assert_close(before, linear(level_grid(level, size)))


def test_levels_without_a_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"6 tokens, 0 of them prefix, has grid None.*language hierarchy"):
        grid_of(Level(torch.zeros(1, 6, 2), "tokens"))
    with pytest.raises(ValueError, match=r"its 36 patches must be rows x columns"):
        level_grid(Level(torch.zeros(1, 37, 2), "tokens", 1, (7, 7)))


def test_standardised_channels() -> None:
    x = torch.randn(2, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9 + 4
    expected = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)
    torch.testing.assert_close(standardise(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(standardise(torch.full((1, 4), 2.0)), torch.zeros(1, 4))
    assert standardise(x.bfloat16()).dtype == torch.float32


def test_pooling_with_a_mask_ignores_padding() -> None:
    values = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(6)[None] < torch.tensor([[4], [6]])
    mean = pooled(Level(values, "tokens", mask=mask))
    torch.testing.assert_close(mean[0], values[0, :4].mean(0))
    torch.testing.assert_close(mean[1], values[1].mean(0))
    mean.sum().backward()
    assert values.grad is not None
    assert not values.grad[0, 4:].any()
    changed = values.detach().masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(pooled(Level(changed, "tokens", mask=mask)), mean)
    assert torch.equal(masked_mean(changed, torch.zeros_like(mask)), torch.zeros(2, 3))
    assert pooled(Level(values.bfloat16(), "tokens")).dtype == torch.float32


def test_scale_factors() -> None:
    assert [scaled_grid((14, 14), factor) for factor in (4, 2, 1, 0.5)] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert scaled_grid((7, 5), 0.1) == (1, 1)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        scaled_grid((7, 5), 0)


def test_target_grids() -> None:
    vit = {"P2": tokens(197), "P3": tokens(197), "P4": tokens(197)}
    assert target_grids(vit, "native") == {"P2": (14, 14), "P3": (14, 14), "P4": (14, 14)}
    assert target_grids(vit, {"P2": 4, "P3": 2, "P5": 0.5}) == {"P2": (56, 56), "P3": (28, 28), "P4": (14, 14)}
    assert target_grids({"P3": vit["P3"]}, {"P3": 0.5}) == {"P3": (7, 7)}
    cnn = {"P2": maps((8, 12)), "P3": maps((4, 6)), "P4": maps((2, 3))}
    assert target_grids(cnn, "native") == {"P2": (8, 12), "P3": (4, 6), "P4": (2, 3)}
    assert target_grids(cnn, {"P2": 4, "P3": 1}) == {"P2": (8, 12), "P3": (2, 3), "P4": (2, 3)}
    with pytest.raises(ValueError, match=r"P4 is not among the levels"):
        target_grids({"P3": cnn["P3"]}, {"P3": 2})


def test_the_teachers_side_is_deterministic_and_detached() -> None:
    level = tokens(257, width=TEACHER_WIDTH)
    level.values.requires_grad_()
    first = teacher_grids({"P3": level}, {"P3": (7, 5), "P4": (1, 1)})
    assert list(first) == ["P3"]
    assert not first["P3"].requires_grad
    assert torch.equal(first["P3"], teacher_grids({"P3": level}, {"P3": (7, 5)})["P3"])
    torch.testing.assert_close(first["P3"], standardise(level_grid(level, (7, 5))).detach())
    with pytest.raises(ValueError, match=r"no target grid for level P3; there is one for P4"):
        teacher_grids({"P3": level}, {"P4": (7, 5)})


@pytest.mark.parametrize("size", [(14, 10), (3, 2), (7, 5)])
def test_projectors_map_each_level_to_the_teachers_width(size: tuple[int, int]) -> None:
    project = VisualProjectors(infos(WIDTH, "P2", "P3"), infos(TEACHER_WIDTH, "P2", "P3")).double()
    levels = {"P2": tokens(40), "P3": maps((7, 5), seed=1)}
    out = project(levels, {"P2": size, "P3": size})
    for name, level in levels.items():
        expected = level_grid(level, size) @ project.lateral[name].weight.T + project.lateral[name].bias
        torch.testing.assert_close(out[name], expected)


@pytest.mark.parametrize("top_down", [False, True])
def test_gradients_reach_what_a_level_is_made_of(top_down: bool) -> None:
    names = ("P2", "P3", "P4")
    project = VisualProjectors(
        infos(WIDTH, *names), infos(TEACHER_WIDTH, *names), top_down=top_down, top_down_width=4
    ).double()
    levels = {name: tokens(40, seed=seed) for seed, name in enumerate(names)}
    for level in levels.values():
        level.values.requires_grad_()
    project(levels, target_grids(levels, {"P2": 2}))["P3"].square().sum().backward()
    reached = {name for name, level in levels.items() if level.values.grad is not None}
    assert reached == ({"P3", "P4"} if top_down else {"P3"})
    assert levels["P3"].values.grad is not None
    assert not levels["P3"].values.grad[:, :5].any()  # prefix tokens
    assert levels["P3"].values.grad[:, 5:].all()
    trained = {key for key, parameter in project.named_parameters() if parameter.grad is not None}
    assert {key.split(".")[1] for key in trained} == reached
    assert {key for key in trained if key.startswith("smooth")} == (
        {"smooth.P3.weight", "smooth.P3.bias"} if top_down else set()
    )


def test_top_down_written_out() -> None:
    names = ("P2", "P3", "P4")
    student = {name: LevelInfo(name, 3 + n, "map") for n, name in enumerate(names)}
    teacher = {name: LevelInfo(name, 6 + n, "tokens") for n, name in enumerate(names)}
    project = VisualProjectors(student, teacher, top_down=True, top_down_width=4).double()
    levels = {"P2": maps((4, 6), width=3), "P4": maps((2, 3), width=5, seed=1)}  # P3 is switched off
    out = project(levels, {"P2": (4, 6), "P4": (2, 3)})
    coarse = project.lateral["P4"](level_grid(levels["P4"]))
    fine = project.lateral["P2"](level_grid(levels["P2"])) + resample(coarse, (2, 3), (4, 6))
    for name, merged, (rows, columns) in (("P2", fine, (4, 6)), ("P4", coarse, (2, 3))):
        kernel, bias = project.smooth[name].weight, project.smooth[name].bias
        picture = merged.view(BATCH, rows, columns, 4)
        assert out[name].shape == (BATCH, rows * columns, teacher[name].width)
        for r, c in ((0, 0), (1, 1), (rows - 1, columns - 2)):
            expected = bias.expand(BATCH, -1).clone()
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    if 0 <= r + dr < rows and 0 <= c + dc < columns:
                        expected = expected + picture[:, r + dr, c + dc] @ kernel[:, :, dr + 1, dc + 1].T
            torch.testing.assert_close(out[name][:, r * columns + c], expected)


def test_projectors_of_other_levels() -> None:
    with pytest.raises(ValueError, match=r"student has levels P2, the teacher P2, P3"):
        VisualProjectors(infos(4, "P2"), infos(4, "P2", "P3"))
    project = VisualProjectors(infos(WIDTH, "P2"), infos(TEACHER_WIDTH, "P2"))
    with pytest.raises(ValueError, match=r"no projector for level P3; there is one for P2"):
        project({"P3": tokens(40)}, {"P3": (7, 5)})


@pytest.mark.parametrize("top_down", [False, True])
def test_under_bf16_autocast(top_down: bool) -> None:
    names = ("P2", "P3")
    project = VisualProjectors(infos(WIDTH, *names), infos(TEACHER_WIDTH, *names), top_down=top_down)
    levels = {name: tokens(40, dtype=torch.bfloat16) for name in names}
    grids = {"P2": (14, 3), "P3": (4, 4)}
    with torch.autocast("cpu", torch.bfloat16):
        out, teacher = project(levels, grids), teacher_grids(levels, grids)
    assert [out[name].shape for name in names] == [(BATCH, 42, TEACHER_WIDTH), (BATCH, 16, TEACHER_WIDTH)]
    assert all(value.isfinite().all() for value in out.values())
    assert {value.dtype for value in teacher.values()} == {torch.float32}


def test_signatures_hold_the_shapes_that_are_passed() -> None:
    def check(name: str, *arguments: object) -> Tensor:
        return jaxtyped(typechecker=beartype)(getattr(pyramid, name))(*arguments)

    values = torch.randn(BATCH, 35, WIDTH)
    assert check("level_grid", tokens(40), (3, 3)).shape == (BATCH, 9, WIDTH)
    assert check("resample", values, (7, 5), (3, 8)).shape == (BATCH, 24, WIDTH)
    assert check("standardise", values).shape == values.shape
    assert check("pooled", maps((3, 4))).shape == (BATCH, WIDTH)
    assert check("masked_mean", values, torch.ones(BATCH, 35, dtype=torch.bool)).shape == (BATCH, WIDTH)
    check("teacher_grids", {"P2": tokens(40)}, {"P2": (3, 3)})

"""Flat rows of a batch of dialogues: the positions that are read, and patches in the order of their picture."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmapkd.data.dialogues import ChatInput
from cmapkd.models.token_types import Rows, Where


def positions(inputs: ChatInput) -> dict[Where, Tensor]:
    """Bool[batch length] by what stands there; no position is in two of them.

    The state at the position before a token of an answer predicts it. This is the only place where the two are shifted.

    Raises:
        ValueError: a dialogue begins with its answer, so nothing predicts the first token.
    """
    if bool(inputs.answer[:, 0].any()):
        raise ValueError("an answer's first token stands at the start of its row: no state predicts it")
    predicting = torch.zeros_like(inputs.answer)
    predicting[:, :-1] = inputs.answer[:, 1:]
    visual = inputs.visual & ~predicting
    prompt = inputs.texts.mask & ~predicting & ~inputs.visual & ~inputs.answer
    return {"answer": predicting, "visual": visual, "prompt": prompt}


def rows_at(states: Float[Tensor, "batch length width"], where: Tensor) -> Rows:
    """The states at the marked positions, dialogue by dialogue."""
    sample, place = where.nonzero(as_tuple=True)
    return Rows(states[sample, place], sample, place)


def visual_rows(states: Float[Tensor, "batch length width"], visual: Tensor) -> Rows:
    """The same of visual tokens, whose place is their number among those of their dialogue."""
    return Rows(states[visual], *visual_places(visual))


def visual_places(visual: Bool[Tensor, "batch length"]) -> tuple[Tensor, Tensor]:
    """The dialogue of each visual token, and its number among those of the dialogue."""
    sample, place = visual.nonzero(as_tuple=True)
    return sample, (visual.cumsum(-1) - 1)[sample, place]


def tile_rows(values: Float[Tensor, "tiles tokens width"], pixels: Tensor, patch: int, extents: Tensor) -> Rows:
    """Patches of tiles, row by row, without the class token in front of them.

    Args:
        pixels: [tiles 3 height width], as the tower was given them.
        extents: Int[batch+1], which tiles each dialogue has.
    """
    patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    return grid_rows(values[:, -patches:], extents)


def grid_rows(values: Float[Tensor, "tiles tokens width"], extents: Tensor) -> Rows:
    """Tokens of tiles, one tile of a dialogue after the other."""
    tokens = values.shape[1]
    sample = _owners(extents, values.device)
    first = extents.to(values.device)[sample]
    place = (torch.arange(len(values), device=values.device) - first)[:, None] * tokens
    place = place + torch.arange(tokens, device=values.device)
    return Rows(values.flatten(0, 1), sample.repeat_interleave(tokens), place.flatten())


def packed_rows(
    values: Float[Tensor, "patches width"], grids: Int[Tensor, "pictures 3"], merge: int, extents: Tensor
) -> Rows:
    """Patches that stand one picture after the other, put into the order of rows and columns of their pictures.

    Args:
        grids: frames, rows and columns of each picture's patches.
        merge: patches are stored in squares of this side.
        extents: Int[batch+1], which pictures each dialogue has.
    """
    order, counts, start = [], [], 0
    for frames, height, width in grids.tolist():
        number = torch.arange(frames * height * width)
        stored = number.view(frames, height // merge, width // merge, merge, merge)
        order.append(stored.transpose(2, 3).flatten() + start)
        counts.append(len(number))
        start += len(number)
    sizes = torch.tensor(counts, device=values.device)
    sample = _owners(extents, values.device).repeat_interleave(sizes)
    per_sample = torch.bincount(sample, minlength=len(extents) - 1)
    place = torch.arange(start, device=values.device) - (per_sample.cumsum(0) - per_sample)[sample]
    return Rows(values[torch.cat(order).to(values.device)], sample, place)


def unwindowed(values: Float[Tensor, "patches width"], tower: Any, grids: Tensor) -> Float[Tensor, "patches width"]:
    """Patches of Qwen2.5-VL's blocks, which work window by window, in the order in which they came in."""
    index = _window_index(tower, grids).to(values.device)
    units = values.reshape(len(index), -1, values.shape[-1])
    return units[index.argsort()].flatten(0, 1)


def _window_index(tower: Any, grids: Tensor) -> Tensor:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as library

    if hasattr(library, "get_vision_window_index"):
        index, _ = library.get_vision_window_index(
            grids,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
    else:  # transformers before 5
        index, _ = tower.get_window_index(grids)
    return torch.as_tensor(index)


def _owners(extents: Tensor, device: torch.device) -> Tensor:
    """The dialogue of each tile or picture."""
    counts = extents.diff()
    return torch.arange(len(counts)).repeat_interleave(counts).to(device)

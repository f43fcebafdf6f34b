"""Some pairs of a batch, at any places, as a batch of their own: `Batch.part` takes neighbours alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmapkd.data.extras import part_of_extra
from cmapkd.data.types import Batch, Input, ModelInput, StoredRows


def chosen_rows(batch: Batch, places: Sequence[int]) -> Batch:
    """The pairs at some places, in that order, as copies; of models of two towers. `bad` stays as it is.

    Raises:
        TypeError, ValueError: a value of `extra` has no rows to choose.
    """
    chosen, size = torch.tensor(places, dtype=torch.int64), len(batch)
    inputs: dict[str, Input] = {}
    for role in batch.inputs:
        held = chosen
        if role in batch.stored:  # the input holds the pictures of samples without an answer
            missing = batch.stored[role].missing
            held = torch.searchsorted(missing, chosen[torch.isin(chosen, missing)])
        inputs[role] = _of_input(batch.pairs(role), chosen, held)
    return replace(
        batch,
        ids=tuple(batch.ids[place] for place in places),
        inputs=inputs,
        captions=tuple(batch.captions[place] for place in places),
        extra={name: _of_extra(value, places, size=size, name=name) for name, value in batch.extra.items()},
        stored={role: _of_stored(rows, chosen) for role, rows in batch.stored.items()},
        streams=tuple(batch.streams[place] for place in places) if batch.streams else (),
        views=tuple(batch.views[place] for place in places) if batch.views else (),
        held_out=None,
    )


def _of_input(given: ModelInput, places: Tensor, images: Tensor) -> ModelInput:
    """Args: images: where the pixels of the pairs at `places` stand."""
    size = max(1, len(given.texts.ids) // given.texts.per_sample)

    def of_view(pixels: Tensor) -> Tensor:
        chosen: Tensor = pixels.unflatten(0, (size, -1))[places]
        return chosen.flatten(0, 1)

    return ModelInput(
        given.images[images],
        given.texts.rows(places),
        {pool: texts.rows(places) for pool, texts in given.more_texts.items()},
        {view: of_view(pixels) for view, pixels in given.more_images.items()},
    )


def _of_stored(rows: StoredRows, places: Tensor) -> StoredRows:
    missing = torch.isin(places, rows.missing).nonzero().flatten()
    return StoredRows({name: array[places] for name, array in rows.arrays.items()}, missing, rows.samples[places])


def _of_extra(value: Any, places: Sequence[int], *, size: int, name: str) -> Any:
    """The rows of the samples at some places, in that order.

    Args:
        value, size, name: as of `part_of_extra`; an object has `rows(places)`.
    Raises:
        TypeError: the value has no rows to choose.
        ValueError: it does not have one row for each sample.
    """
    if isinstance(value, Mapping):
        return {key: _of_extra(each, places, size=size, name=f"{name}[{key!r}]") for key, each in value.items()}
    if hasattr(value, "rows"):
        return value.rows(places)
    if hasattr(value, "part"):
        raise TypeError(
            f"batch.extra[{name!r}] is of type {type(value).__name__}, of which single samples cannot be chosen: make "
            "it a tensor or a sequence with a row for each sample, or give it a method rows(places)"
        )
    part_of_extra(value, 0, 0, size=size, name=name)  # refuses what has no rows, or too few
    if isinstance(value, Tensor):
        return value[torch.tensor(places, dtype=torch.int64, device=value.device)]
    return value[list(places)] if isinstance(value, np.ndarray) else [value[place] for place in places]

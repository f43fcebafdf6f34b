"""Losses over all pairs of samples, some rows at a time: memory grows with batch x chunk and not with batch squared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Where nobody says how many rows: all up to so many logits (16 MiB in float32, of which a loss makes about ten),
WHOLE_UP_TO = 2**22
# beyond it so many logits at a time, but never so few rows that a GPU only waits for launches.
CHUNK_LOGITS, CHUNK_ROWS = 2**20, 256


def chunk_rows(num_rows: int, num_columns: int, chunk: int | None) -> int:
    """Rows to take at a time: `chunk`, or for None all of them up to 2^22 logits, then 2^20 logits or 256 rows.

    Raises:
        ValueError: the chunk is not positive.
    """
    if chunk is None:
        whole = num_rows * num_columns <= WHOLE_UP_TO
        return num_rows if whole else min(num_rows, max(CHUNK_ROWS, CHUNK_LOGITS // num_columns))
    if chunk < 1:
        raise ValueError(f"chunk must be at least one row, got {chunk}; None chooses by the size of the batch")
    return min(chunk, num_rows)


def by_rows(function: Callable[..., Tensor], *rows: Tensor, size: int, dim: int = 0) -> Tensor:
    """`function` of chunks of the rows, joined: the values and gradients of all at once.

    Each chunk is computed again in the backward pass, so that between the passes nothing of it is kept.

    Args:
        function: of as many tensors as `rows`, to one whose rows each depend on the same row of the arguments alone.
        rows: have equal numbers of rows.
        size: rows at a time.
        dim: where the rows stand, in the arguments and in the result.
    """
    if size >= rows[0].shape[dim]:
        return function(*rows)
    run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    chunks = zip(*(tensor.split(size, dim) for tensor in rows), strict=True)
    return torch.cat([run(*chunk) for chunk in chunks], dim)

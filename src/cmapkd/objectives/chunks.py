"""Losses over all pairs of samples, some rows at a time: memory grows with batch x chunk and not with batch squared.

Where several processes hold the same samples, each may compute a part of the rows (`split_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Where nobody says how many rows: all up to so many logits (16 MiB in float32, of which a loss makes about ten),
WHOLE_UP_TO = 2**22
# beyond it so many logits at a time, but never so few rows that a GPU only waits for launches.
CHUNK_LOGITS, CHUNK_ROWS = 2**20, 256


@dataclass(frozen=True, slots=True)
class _RowSplit:
    """Who computes which rows."""

    number: int
    of: int
    gather: Callable[[Tensor], Tensor]

    def fit(self, num_rows: int) -> bool:
        return num_rows % self.of == 0


_row_split: ContextVar[_RowSplit | None] = ContextVar("row_split", default=None)


@contextmanager
def split_rows(number: int, of: int, gather: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, `map_split_rows` computes part `number` of `of` equal parts of the rows; `gather` brings the others.

    Args:
        gather: the rows [rows, ...] of one part to the rows of all parts, in their order. It sums the gradient over
            all processes that compute. The average of parameters' gradients over these processes is then the gradient
            of all rows at once.
    """
    token = _row_split.set(_RowSplit(number, of, gather))
    try:
        yield
    finally:
        _row_split.reset(token)


def map_split_rows(function: Callable[..., Tensor], *rows: Tensor, dim: int = 0) -> Tensor:
    """`function` of the rows: of all of them, or within `split_rows` of one part, with the others from their processes.

    Args:
        function: of as many tensors as `rows`, to one whose rows each depend on the same row of the arguments alone.
        rows: have equal numbers of rows. A number that does not divide into the parts is computed whole.
        dim: where the rows stand, in the arguments and in the result.
    """
    here, gather = own_rows(rows[0].shape[dim])
    if gather is None:
        return function(*rows)
    computed = function(*(tensor.narrow(dim, here.start, here.stop - here.start) for tensor in rows))
    return gather(computed.movedim(dim, 0)).movedim(0, dim)


def own_rows(num_rows: int) -> tuple[slice, Callable[[Tensor], Tensor] | None]:
    """The rows to compute here, and what brings the same of the other parts; all and None where nobody shares them.

    Args:
        num_rows: of all parts. A number that does not divide into the parts is computed whole.
    """
    split = _row_split.get()
    if split is None or not split.fit(num_rows):
        return slice(0, num_rows), None
    count = num_rows // split.of
    return slice(split.number * count, (split.number + 1) * count), split.gather


def chunk_rows(num_rows: int, num_columns: int, chunk: int | None) -> int:
    """Rows to take at a time: `chunk`, or for None all of them up to 2^22 logits, then 2^20 logits or 256 rows.

    Within `split_rows` the same holds for the rows of one part.

    Raises:
        ValueError: the chunk is not positive.
    """
    split = _row_split.get()
    if split is not None and split.fit(num_rows):
        num_rows //= split.of
    return columns_at_once(num_rows, num_columns, chunk)


def columns_at_once(num_rows: int, num_columns: int, chunk: int | None) -> int:
    """`chunk_rows` of what is never split: the columns of a loss, such as the entries of a bank."""
    if chunk is None:
        whole = num_rows * num_columns <= WHOLE_UP_TO
        return num_rows if whole else min(num_rows, max(CHUNK_ROWS, CHUNK_LOGITS // num_columns))
    if chunk < 1:
        raise ValueError(f"chunk must be at least one row, got {chunk}; None chooses by the size of the batch")
    return min(chunk, num_rows)


def by_rows(function: Callable[..., Tensor], *rows: Tensor, size: int, dim: int = 0) -> Tensor:
    """`function` of chunks of the rows, joined: the values and gradients of all at once, split as by `map_split_rows`.

    Each chunk is computed again in the backward pass, so that between the passes nothing of it is kept.

    Args:
        function: of as many tensors as `rows`, to one whose rows each depend on the same row of the arguments alone.
        rows: have equal numbers of rows.
        size: rows at a time.
        dim: where the rows stand, in the arguments and in the result.
    """

    def of_split(*split: Tensor) -> Tensor:
        if size >= split[0].shape[dim]:
            return function(*split)
        run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        chunks = zip(*(tensor.split(size, dim) for tensor in split), strict=True)
        return torch.cat([run(*chunk) for chunk in chunks], dim)

    return map_split_rows(of_split, *rows, dim=dim)

"""Losses over all pairs of samples, some rows at a time: memory grows with batch x chunk and not with batch squared.

Where several processes hold the same samples, each may take its own share of the rows (`rows_shared`).
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
class _Shares:
    """Who computes which rows."""

    number: int
    of: int
    gather: Callable[[Tensor], Tensor]

    def fit(self, num_rows: int) -> bool:
        return num_rows % self.of == 0


_shares: ContextVar[_Shares | None] = ContextVar("shares", default=None)


@contextmanager
def rows_shared(number: int, of: int, gather: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, `share_rows` computes share `number` of the rows, and has the others' from `gather`.

    Args:
        gather: a share's rows [rows, ...] to all shares' in their order. It passes the gradient on summed over all that
            compute, so whoever averages parameters' gradients over them has the gradient of all rows at once.
    """
    token = _shares.set(_Shares(number, of, gather))
    try:
        yield
    finally:
        _shares.reset(token)


def share_rows(function: Callable[..., Tensor], *rows: Tensor, dim: int = 0) -> Tensor:
    """`function` of the rows: of all here, or within `rows_shared` of one share, and the others' from where they are.

    Args:
        function: of as many tensors as `rows`, to one whose rows each depend on the same row of the arguments alone.
        rows: have equal numbers of rows. A number that does not divide into the shares is computed whole.
        dim: where the rows stand, in the arguments and in the result.
    """
    shares, num_rows = _shares.get(), rows[0].shape[dim]
    if shares is None or not shares.fit(num_rows):
        return function(*rows)
    count = num_rows // shares.of
    own = function(*(tensor.narrow(dim, shares.number * count, count) for tensor in rows))
    return shares.gather(own.movedim(dim, 0)).movedim(0, dim)


def chunk_rows(num_rows: int, num_columns: int, chunk: int | None) -> int:
    """Rows to take at a time: `chunk`, or for None all of them up to 2^22 logits, then 2^20 logits or 256 rows.

    Within `rows_shared` no more than one share, of which the same is said: then fewer than all.

    Raises:
        ValueError: the chunk is not positive.
    """
    shares = _shares.get()
    if shares is not None and shares.fit(num_rows):
        num_rows //= shares.of
    return columns_at_once(num_rows, num_columns, chunk)


def columns_at_once(num_rows: int, num_columns: int, chunk: int | None) -> int:
    """`chunk_rows` of what is never shared: the columns of a loss, such as the entries of a bank."""
    if chunk is None:
        whole = num_rows * num_columns <= WHOLE_UP_TO
        return num_rows if whole else min(num_rows, max(CHUNK_ROWS, CHUNK_LOGITS // num_columns))
    if chunk < 1:
        raise ValueError(f"chunk must be at least one row, got {chunk}; None chooses by the size of the batch")
    return min(chunk, num_rows)


def by_rows(function: Callable[..., Tensor], *rows: Tensor, size: int, dim: int = 0) -> Tensor:
    """`function` of chunks of the rows, joined: the values and gradients of all at once, as `share_rows` shares them.

    Each chunk is computed again in the backward pass, so that between the passes nothing of it is kept.

    Args:
        function: of as many tensors as `rows`, to one whose rows each depend on the same row of the arguments alone.
        rows: have equal numbers of rows.
        size: rows at a time.
        dim: where the rows stand, in the arguments and in the result.
    """

    def of_share(*own: Tensor) -> Tensor:
        if size >= own[0].shape[dim]:
            return function(*own)
        run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        chunks = zip(*(tensor.split(size, dim) for tensor in own), strict=True)
        return torch.cat([run(*chunk) for chunk in chunks], dim)

    return share_rows(of_share, *rows, dim=dim)

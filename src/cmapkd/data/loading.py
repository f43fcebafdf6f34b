"""Batches in the order of a sampler, made ahead by worker processes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice

from torch.utils.data import Dataset

from cmapkd.data.batches import Batches
from cmapkd.data.config import PREFETCH_MIB as PREFETCH_MIB
from cmapkd.data.fetch_ahead import FetchAhead
from cmapkd.data.pieces import InPieces, Part, Piece, Pieces, bytes_of_rows, rows_of_piece
from cmapkd.data.plans import PlanSampler
from cmapkd.data.types import Batch
from cmapkd.data.workers import ReadAhead


def make_loader(
    builder: Batches,
    sampler: PlanSampler,
    *,
    workers: int,
    pin_memory: bool,
    timeout: float = 0.0,
    prefetch_mib: int = PREFETCH_MIB,
) -> Generator[Batch]:
    """Batches in the sampler's order, made by `workers` processes (0: by this one). See `ReadAhead`.

    A batch whose rows can be made apart is made by all workers together, in pieces. Remote shards are fetched before
    they are read, see `FetchAhead`.

    Args:
        timeout: seconds in which nothing may come, before the pass ends; 0: any time.
        prefetch_mib: MiB of shared memory that pieces take while they are made and wait.
    Raises (on the way):
        ConfigError: there is no room for one sample.
    """
    batches = _batches(builder, sampler, workers, pin_memory, timeout, prefetch_mib)
    with FetchAhead(builder.source, sampler) as fetching, closing(batches):
        for number, batch in enumerate(batches):
            fetching.advance(sampler.start + number)
            yield batch


def _batches(
    builder: Batches, sampler: PlanSampler, workers: int, pin_memory: bool, timeout: float, prefetch_mib: int
) -> Generator[Batch]:
    """See `make_loader`."""
    size = sampler.batch_size // sampler.world_size
    if not workers or not isinstance(builder, InPieces):
        yield from ReadAhead(
            builder,  # type: ignore[arg-type]
            sampler,
            workers=workers,
            pin_memory=pin_memory,
            timeout=timeout,
            item_bytes=builder.bytes_of(size) if workers else 0,
            room=prefetch_mib * 2**20,
            name=lambda plan: Piece(plan, 0, size).name(),
        )
        return
    pixels = -(-builder.bytes_of(size) // size)
    rows = rows_of_piece(size, workers=workers, pixels=pixels, mib=prefetch_mib)
    pieces = Pieces(sampler, rows)
    made: Iterator[Part] = iter(
        ReadAhead(
            _PieceMaker(builder),
            pieces,
            workers=workers,
            pin_memory=pin_memory,
            timeout=timeout,
            item_bytes=bytes_of_rows(rows, pixels),
            room=prefetch_mib * 2**20,
            most=pieces.ahead(workers),
            together=pieces.each,
            name=Piece.name,
        )
    )
    for plan in sampler:
        batch = builder.join(plan, [*islice(made, pieces.each)])
        yield batch.pin_memory() if pin_memory else batch


class _PieceMaker(Dataset[Part]):
    """A builder's pieces, as data workers make them."""

    def __init__(self, builder: InPieces) -> None:
        self.builder = builder

    def __getitem__(self, piece: Piece) -> Part:
        return self.builder.piece(*piece)

"""Batches in pieces, which several processes make at once: the cuts, and what a piece holds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from cmapkd.config import ConfigError
from cmapkd.data.plans import Plan, PlanSampler
from cmapkd.data.ring import SHARED_MEMORY, joined
from cmapkd.data.types import Batch, Input, StoredRows
from cmapkd.data.workers import MOST_AHEAD, slot_bytes

MOST_ROWS = 256  # samples of a piece
_BATCHES_AHEAD = 2  # that there should be slots for
_MOST_EACH = 64  # pieces that wait for one worker
_BESIDE = 4096  # bytes of a sample's tokens and names, about


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a batch, made without knowing the others.

    Attributes:
        texts: what was chosen of each sample, see `batches.Choice`.
        extras: by name, what is kept of each sample.
        views: the view number of each sample.
        tried: samples that were tried in place of unreadable ones.
        held_out: see `Batch`.
    """

    ids: tuple[str, ...]
    texts: tuple[Any, ...]
    inputs: Mapping[str, Input]
    stored: Mapping[str, StoredRows]
    extras: Mapping[str, list[Any]]
    views: tuple[int, ...]
    bad: tuple[tuple[str, str], ...] = ()
    tried: tuple[int, ...] = ()
    held_out: Batch | None = None


class Rows:
    """What is read of the samples of a batch, row by row."""

    def __init__(
        self, roles: Iterable[str], more_views: Iterable[str], stored: Iterable[str], extras: Iterable[str]
    ) -> None:
        roles = tuple(roles)
        self.ids: list[str] = []
        self.indices: list[int] = []
        self.views: list[int] = []
        self.texts: list[Any] = []
        self.own: dict[str, list[tuple[int, Any]]] = {}  # by role with views of its own: their numbers and texts
        self.missing: dict[str, list[int]] = {role: [] for role in stored}
        self.items: dict[str, list[Any]] = {role: [] for role in roles}
        self.more_items: dict[str, dict[str, list[Any]]] = {name: {role: [] for role in roles} for name in more_views}
        self.extras: dict[str, list[Any]] = {name: [] for name in extras}
        self.bad: list[tuple[str, str]] = []
        self.tried: list[int] = []

    def answers(self, stored: Mapping[str, Any], named: Callable[[Any], str]) -> dict[str, StoredRows]:
        """The stored answers to the rows by role.

        Args:
            stored: of each role, see `batches.Answers`.
            named: names the texts that were chosen for a sample.
        """
        said = [*zip(self.views, map(named, self.texts), strict=True)]
        found: dict[str, StoredRows] = {}
        for role, answers in stored.items():
            own = [(number, named(chosen)) for number, chosen in self.own.get(role, ())]
            views, texts = (list(each) for each in zip(*(own or said), strict=True))
            view: int | list[Any] = views[0] if len(set(views)) == 1 else views
            found[role] = answers.read(view, self.indices, self.ids, texts, self.missing[role])
        return found

    def part(self, inputs: Mapping[str, Input], stored: Mapping[str, StoredRows]) -> Part:
        """The rows as a piece, with what was made of them together."""
        return Part(
            tuple(self.ids),
            tuple(self.texts),
            inputs,
            stored,
            self.extras,
            tuple(self.views),
            bad=tuple(self.bad),
            tried=tuple(self.tried),
        )


@runtime_checkable
class InPieces(Protocol):
    """Batches whose rows can be made apart. `join` of all pieces is the batch, however it was cut."""

    def piece(self, plan: Plan, first: int, last: int) -> Part:
        """The rows from `first` to before `last` of `plan.mine`."""
        ...

    def join(self, plan: Plan, parts: Sequence[Part]) -> Batch:
        """The batch of all its pieces, in their order."""
        ...


class Piece(NamedTuple):
    """Which rows of a step's batch a worker makes."""

    plan: Plan
    first: int
    last: int

    def name(self) -> str:
        """For messages."""
        mine = self.plan.mine[self.first : self.last]
        samples = ", ".join(map(str, mine[:8])) + ", ..." * (len(mine) > 8)
        return f"the batch of step {self.plan.step + 1}, samples {samples}"


class Pieces:
    """The pieces of the batches of a sampler, all of the first, then all of the second.

    Attributes:
        rows: samples of a piece; the last one of a batch may have fewer.
        each: pieces of a batch.
    """

    def __init__(self, sampler: PlanSampler, rows: int) -> None:
        size = sampler.batch_size // sampler.world_size
        self.sampler, self.size, self.rows, self.each = sampler, size, rows, -(-size // rows)

    def __iter__(self) -> Iterator[Piece]:
        return self.skip(0)

    def skip(self, count: int) -> Iterator[Piece]:
        """All but the first `count`."""
        batches, pieces = divmod(count, self.each)
        for plan in self.sampler.skip(batches):
            for first in range(pieces * self.rows, self.size, self.rows):
                yield Piece(plan, first, min(first + self.rows, self.size))
            pieces = 0

    def ahead(self, workers: int) -> int:
        """How many pieces each worker should have room for ahead, so that two batches can wait."""
        return min(_MOST_EACH, max(MOST_AHEAD, -(-_BATCHES_AHEAD * self.each // workers)))


def bytes_of_rows(rows: int, pixels: int) -> int:
    """About the bytes of a piece.

    Args:
        pixels: bytes of a sample's pictures and stored answers.
    """
    return rows * (pixels + _BESIDE)


def rows_of_piece(size: int, *, workers: int, pixels: int, mib: int) -> int:
    """How many rows a piece has: each worker gets a piece of every batch, and there is room for two of each.

    Args:
        size: samples of a batch.
        pixels: bytes of a sample's pictures and stored answers.
        mib: MiB that all pieces together may take; no more than half of the free shared memory are taken.
    Raises:
        ConfigError: there is no room for one sample.
    """
    room, free = mib * 2**20, None
    with suppress(OSError):
        free = shutil.disk_usage(SHARED_MEMORY).free
        room = min(room, free // 2)
    if slot_bytes(bytes_of_rows(1, pixels)) > room:
        said = "" if free is None else f", and {SHARED_MEMORY} has {free / 2**20:.1f} MiB free, of which half is used"
        raise ConfigError(
            f"a sample takes {slot_bytes(bytes_of_rows(1, pixels)) / 2**20:.2f} MiB to be handed over by a data "
            f"worker, but data.prefetch_mib is {mib}{said}: raise it, or set data.workers=0"
        )
    rows = min(MOST_ROWS, -(-size // workers))
    while rows > 1 and 2 * workers * slot_bytes(bytes_of_rows(rows, pixels)) > room:
        rows = -(-rows // 2)
    return rows


def united_rows(parts: Sequence[StoredRows], sizes: Sequence[int]) -> StoredRows:
    """Stored answers to the samples of several pieces.

    Args:
        sizes: samples of each piece.
    """
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return StoredRows(
        {name: joined([part.arrays[name] for part in parts]) for name in parts[0].arrays},
        torch.cat([part.missing + start for part, start in zip(parts, starts, strict=True)]),
        torch.cat([part.samples for part in parts]),
    )

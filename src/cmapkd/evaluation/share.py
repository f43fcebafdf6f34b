"""An evaluation dealt out to several processes: each computes a part of the batches, the first has all and scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share:
    """Which batches this process computes, and how what it found reaches the first one.

    The first process evaluates `with` it, and calls the others when its model computes. The others wait in `asked`.

    Attributes:
        rank: of this process, among `of`.
        group: of the processes, on the host (gloo); None for one alone.
    """

    rank: int = 0
    of: int = 1
    group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process scores."""
        return self.rank == 0

    @property
    def mine(self) -> slice:
        """Of all batches, those of this process."""
        return slice(self.rank, None, self.of)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        if kind is None:  # else this process ends, and with it the connections on which the others wait
            self._tell(None)

    def call(self, **arguments: Any) -> None:
        """From the first process: the others compute now, with the same arguments."""
        if self.leads:
            self._tell(arguments)

    def asked(self) -> dict[str, Any] | None:
        """In another process: waits until it is called, and returns the arguments; None at the end."""
        told: list[Any] = [None]
        dist.broadcast_object_list(told, 0, group=self.group)
        return told[0]  # type: ignore[no-any-return]

    def all_of(self, own: Iterable[T]) -> Iterable[T]:
        """What each process has of its batches, for all batches in their order, in every process.

        One process alone gets each as it comes.
        """
        if self.of == 1:
            return own
        parts: list[Any] = [None] * self.of
        dist.all_gather_object(parts, [*own], group=self.group)
        return [parts[number % self.of][number // self.of] for number in range(sum(map(len, parts)))]

    def rows(self, own: Mapping[str, Tensor], sizes: Sequence[int]) -> dict[str, Tensor]:
        """In the first process, the rows of all batches by name; in the others, nothing.

        Args:
            own: by name, the rows [rows ...] of this process's batches, on the CPU. A process without rows may lack
                names.
            sizes: how many rows each of all batches has.
        """
        if self.of == 1:
            return dict(own)
        kinds: list[Any] = [None] * self.of
        here = {name: (tuple(rows.shape[1:]), rows.dtype) for name, rows in own.items()}
        dist.all_gather_object(kinds, here, group=self.group)
        found: dict[str, Tensor] = {}
        for name in sorted(set().union(*kinds)):
            shape, dtype = next(kind[name] for kind in kinds if name in kind)
            if self.leads:
                mine = own.get(name, torch.empty(0, *shape, dtype=dtype))
                found[name] = self._interleaved(mine, sizes)
            elif sum(sizes[self.mine]):
                dist.send(own[name].contiguous(), 0, group=self.group)
        return found

    def _interleaved(self, mine: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows of all batches in their order: the own ones, and those that the others send."""
        blocks: list[Tensor] = [mine] * len(sizes)
        for rank in range(self.of):
            theirs = sizes[rank :: self.of]
            rows = mine if rank == 0 else mine.new_empty(sum(theirs), *mine.shape[1:])
            if rank and len(rows):
                dist.recv(rows, rank, group=self.group)
            blocks[rank :: self.of] = rows.split(theirs)
        return torch.cat(blocks) if blocks else mine

    def _tell(self, what: dict[str, Any] | None) -> None:
        if self.of > 1:
            dist.broadcast_object_list([what], 0, group=self.group)


ALONE = Share()
"""One process does everything."""

"""Held-out pairs: never trained on, brought beside some of the training batches, for losses that must not be fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.utils.data import Dataset

from cmapkd.config import ConfigError
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.open import open_source
from cmapkd.data.parts import PartOfSource
from cmapkd.data.pieces import Part
from cmapkd.data.plans import Plan, PlanSampler
from cmapkd.data.random import key_of
from cmapkd.data.streams import Stream
from cmapkd.data.types import Batch, Source


def open_held_out(train: str, held_out: int | str, *, require_captions: bool = False) -> Source:
    """The pairs that a run never trains on: the last so many of `train`, or a source of their own.

    Raises:
        ConfigError: the source cannot be opened, or has too few samples.
    """
    if isinstance(held_out, str):
        return open_source(held_out, split="train", require_captions=require_captions)
    main = open_source(train, split="train", require_captions=require_captions)
    return PartOfSource(main, len(main) - held_out, len(main))


class WithHeldOut(Dataset[Batch]):
    """The batches of a builder; those of every `every`-th step, from the first on, with held-out pairs beside them.

    Which pairs is a pure function of the seed and the step: each epoch of the held-out pairs is a new permutation. So a
    resume and any number of processes read the same ones.

    Args:
        held_out: makes batches of the held-out pairs, for the student alone.
        batch_size: held-out pairs at once over all processes, as many as a training batch has; fewer where there are
            fewer. None: all of them, each time in the same views.
    Raises:
        ConfigError: there are fewer held-out pairs than processes; in `__getitem__`, a training batch has one of them.
    """

    def __init__(
        self,
        builder: BatchBuilder | WithHeldOut,
        held_out: BatchBuilder,
        *,
        every: int,
        batch_size: int | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        length = len(held_out.source)
        size = min(batch_size or length, length) // world_size * world_size
        if not size:
            raise ConfigError(f"data.held_out has {length} pairs for {world_size} processes: give more pairs")
        self.builder, self.held_out, self.every = builder, held_out, every
        self.always_the_same = batch_size is None
        self.sampler = PlanSampler(
            length,
            batch_size=size,
            seed=key_of("held out", seed) % 2**63,
            start=0,
            stop=0,
            rank=rank,
            world_size=world_size,
        )
        self._known: set[str] = set()  # ids of held-out pairs

    @property
    def source(self) -> Source:
        """Of the training pairs."""
        source: Source = self.builder.source
        return source

    @property
    def streams(self) -> Sequence[Stream]:
        """Of the training pairs."""
        return self.builder.streams

    def bytes_of(self, size: int) -> int:
        """Of all held-out pairs together every reading process holds a batch; of others one in `every` batches."""
        beside = self.held_out.bytes_of(self.sampler.batch_size // self.sampler.world_size)
        return self.builder.bytes_of(size) + (beside if self.always_the_same else beside // self.every)

    def __getitem__(self, plan: Plan) -> Batch:
        return self.join(plan, [self.piece(plan, 0, len(plan.mine))])

    def piece(self, plan: Plan, first: int, last: int) -> Part:
        """The rows from `first` to before `last`; held-out pairs come with the first ones."""
        part = self.builder.piece(plan, first, last)
        if first or plan.step % self.every:
            return part
        number = 0 if self.always_the_same else plan.step // self.every
        return replace(part, held_out=self.held_out[self.sampler.plan(number)])

    def join(self, plan: Plan, parts: Sequence[Part]) -> Batch:
        """The batch of all its pieces, in their order.

        Raises:
            ConfigError: a held-out pair is trained on.
        """
        batch = self.builder.join(plan, parts)
        if (beside := parts[0].held_out) is not None:
            self._known.update(beside.ids)
            batch = replace(batch, held_out=beside)
        trained = self._known.intersection(batch.ids)
        if trained:
            raise ConfigError(
                f"sample {min(trained)!r} is among data.held_out and is trained on at step {plan.step + 1}, so a loss "
                "on it is fitted: name other pairs, or give data.held_out a number of pairs of data.train"
            )
        return batch

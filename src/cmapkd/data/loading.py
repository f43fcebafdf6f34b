"""Batches in the order of a sampler, made ahead by worker processes."""

from __future__ import annotations

from collections.abc import Generator

from torch.utils.data import Dataset

from cmapkd.config import ConfigError
from cmapkd.data.batches import Batches
from cmapkd.data.fetch_ahead import FetchAhead
from cmapkd.data.plans import Plan, PlanSampler
from cmapkd.data.types import BadSampleError, Batch
from cmapkd.data.workers import ReadAhead


def make_loader(
    builder: Batches, sampler: PlanSampler, *, workers: int, pin_memory: bool, timeout: float = 0.0
) -> Generator[Batch]:
    """Batches in the sampler's order, made by `workers` processes (0: by this one), none of which may take longer than
    `timeout` seconds (0: any time). See `ReadAhead`. Remote shards are fetched before they are read, see `FetchAhead`.
    """

    def name(plan: Plan) -> str:
        samples = ", ".join(map(str, plan.mine[:8])) + ", ..." * (len(plan.mine) > 8)
        return f"the batch of step {plan.step + 1}, samples {samples}"

    ahead = ReadAhead(
        _Carrying(builder),
        sampler,
        workers=workers,
        pin_memory=pin_memory,
        timeout=timeout,
        item_bytes=builder.bytes_of(sampler.batch_size // sampler.world_size) if workers else 0,
        name=name,
    )
    with FetchAhead(builder.source, sampler) as fetching:
        for number, made in enumerate(ahead):
            if isinstance(made, ValueError):
                raise made
            fetching.advance(sampler.start + number)
            yield made


class _Carrying(Dataset["Batch | ValueError"]):
    """Hands an error about the data over as a value: raised in a worker, torch would make another error of it."""

    def __init__(self, builder: Batches) -> None:
        self.builder = builder

    def __getitem__(self, plan: Plan) -> Batch | ValueError:
        try:
            return self.builder[plan]
        except (BadSampleError, ConfigError) as error:
            return error

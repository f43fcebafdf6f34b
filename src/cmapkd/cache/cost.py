"""What a cache costs and saves, measured on a few samples that are really stored and read."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cmapkd.cache.files import CacheError
from cmapkd.cache.prepare import CachePlan
from cmapkd.data.readers import Shared
from cmapkd.data.records import Unusable
from cmapkd.data.types import BadSampleError
from cmapkd.data.views import draw_view
from cmapkd.models.reading import reader_of

MEASURED_ROWS = 64


@dataclass
class Cost:
    """Seconds for one row."""

    fetch: float = 0.0  # the sample from its source
    prepare: float = 0.0  # its image in the teacher's form
    answer: float = 0.0  # the teacher
    build: float = 0.0  # all of these, and storing the answer
    read: float = 0.0  # the stored answer


def measure(plan: CachePlan, *, device: torch.device | str) -> Cost:
    """Times the parts on the plan's first samples, in this process; the small cache made for it is removed.

    Raises:
        CacheError: no sample can be read, or an answer cannot be stored.
    """
    cost = Cost()
    plan.teacher.to(device)
    with tempfile.TemporaryDirectory() as folder:
        config = plan.config.model_copy(update={"folder": Path(folder) / "cache", "max_gib": 1e6})
        small = replace(plan, config=config, keys=plan.keys.first(MEASURED_ROWS))
        _ = small.identity, small.layout  # hashed and asked once, not for each row
        with _timed(cost, "build"):
            small.build(device=device)
        reader = small.open()
        views, texts = plan.views, plan.texts
        form = reader_of(plan.teacher.model, max_tokens=plan.max_tokens, fast=views.reading == "fast")
        keys = small.keys.listed().tolist()
        view = keys[0] // len(plan.source)
        ids, indices, chosen, items = [], [], [], []
        for key in keys:
            if key // len(plan.source) != view:
                break
            try:
                with _timed(cost, "fetch"):
                    sample = plan.source[key % len(plan.source)]
                drawn = draw_view(sample.id, view, views, sample.image.size)
                said = texts.choose(sample, drawn, view)
                with _timed(cost, "prepare"):
                    item = form.read(*drawn.prepare(sample.image), said)
            except (BadSampleError, Unusable):
                continue
            items.append(item)
            ids.append(sample.id)
            indices.append(key % len(plan.source))
            chosen.append(said)
        if not ids:
            raise CacheError(f"none of the first samples of {plan.source.name} can be read")
        inputs = form.join(items, *texts.columns(chosen), {}, Shared()).to(device)
        answered = [texts.named(said) for said in chosen]
        with _timed(cost, "answer"):
            live = reader.cache.layout.ask(plan.teacher, inputs, plan.precision)
            next(iter(live.values())).sum().item()  # a GPU has finished only now
        reader.read(view, indices, ids, answered, [])
        with _timed(cost, "read"):
            reader.read(view, indices, ids, answered, [])
    rows = len(ids)
    return Cost(
        cost.fetch / rows, cost.prepare / rows, cost.answer / rows, cost.build / len(small.keys), cost.read / rows
    )


@contextmanager
def _timed(cost: Cost, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    setattr(cost, name, getattr(cost, name) + time.perf_counter() - start)

"""Before the first step: a pass over the training data, from which a method builds targets of its teachers' answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.cache.rows import as_in_training
from cmapkd.cache.teacher import REFERENCE_SEED
from cmapkd.cache.wanted import Keys, Wanted
from cmapkd.data.batches import Answers, BatchBuilder, Choice
from cmapkd.data.labels import NO_LABEL
from cmapkd.data.plans import Plan
from cmapkd.data.types import Batch, Source
from cmapkd.data.workers import ReadAhead
from cmapkd.features import gather_rows, own_place, sample_keys
from cmapkd.methods import LABELS, Method
from cmapkd.methods.targets import Answered
from cmapkd.models import Features, LevelRequest
from cmapkd.models.types import BOTH, Tower
from cmapkd.run.build import read_streams, readers_of, teacher_views
from cmapkd.run.cached import wanted_keys
from cmapkd.run.config import RunConfig
from cmapkd.training.checkpoint import list_checkpoints
from cmapkd.training.processes import wait_for_all

MOST_AT_ONCE = 256  # samples that a live teacher answers at once
_NO_KEY = -1


def prepare_targets(
    config: RunConfig,
    method: Method,
    source: Source,
    stored: Mapping[str, Answers],
    texts: Choice,
    *,
    out: Path,
    resume: bool,
    voice: Callable[[str], None],
) -> None:
    """Lets the method build its targets, where it has any and no checkpoint of this run holds them.

    Args:
        stored: answers from a cache, by role.
        out: folder of the run.
        voice: says what is done.
    """
    if not method.prepares or (resume and list_checkpoints(out / "checkpoints")):
        return
    voice("building targets of the teacher's answers")
    wait_for_all()
    for teacher in method.teachers.values():
        teacher.to(PartialState().device)
    method.prepare(survey_of(config, method, source, stored, texts))
    as_the_first_process(method)


def survey_of(
    config: RunConfig, method: Method, source: Source, stored: Mapping[str, Answers], texts: Choice
) -> SurveyOfRun:
    """A pass over what a run of this config reads; see `prepare_targets`."""
    assert config.data.views is not None
    wanted = wanted_keys(config, method, source, config.data.views, whole=False)
    return SurveyOfRun(config, method, source, dict(stored), texts, wanted)


@torch.no_grad()
def as_the_first_process(method: Method) -> None:
    """Gives every process the buffers of the first one, whose arithmetic may round otherwise."""
    if own_place()[1] == 1:
        return
    device = PartialState().device
    for buffer in method.buffers():
        sent = buffer.to(device).contiguous()
        dist.broadcast(sent, 0)
        buffer.copy_(sent)


@dataclass(frozen=True)
class SurveyOfRun:
    """See `methods.targets.Survey`."""

    config: RunConfig
    method: Method
    source: Source
    stored: dict[str, Answers]
    texts: Choice
    wanted: Wanted  # what the run reads, in the student's views

    def __call__(
        self, role: str = "teacher", *, num: int | None = None, towers: tuple[Tower, ...] = BOTH
    ) -> Iterator[Answered]:
        plans, builder = self.plans(num, role), self._builder(role)
        rank, processes = own_place()
        rounds = range(rank, -(-len(plans) // processes) * processes, processes)
        own = [plans[number] for number in rounds if number < len(plans)]
        device, seen = PartialState().device, set[int]()
        size = len(plans[0].mine)
        workers = min(self.config.data.workers, len(own))
        ahead = ReadAhead(
            builder,
            own,
            workers=workers,
            timeout=self.config.data.timeout,
            item_bytes=builder.bytes_of(size) if workers else 0,
            name=lambda plan: f"batch {plan.step} of the teacher's answers",
        )
        batches = iter(ahead)
        for _ in rounds:
            batch = next(batches, None)
            answered = None if batch is None else self._answered(batch, role, towers, device)
            for part in _of_all(answered, size, self._widths(role, towers), device):
                fresh = torch.tensor([key not in seen for key in part.keys.tolist()], dtype=torch.bool)
                seen.update(part.keys.tolist())
                if bool(fresh.any()):  # a sample in the place of an unreadable one may come again
                    yield Answered(*(column[fresh] for column in (part.image, part.text, part.keys, part.labels)))

    def plans(self, num: int | None, role: str = "teacher") -> list[Plan]:
        """The batches of the pass, each sample once in its first view; the same for any number of processes."""
        keys = self.keys(role)
        if num is not None and num < len(keys):
            chosen = np.random.default_rng(REFERENCE_SEED).choice(len(keys), num, replace=False, shuffle=False)
            keys = keys[np.sort(chosen)]
        views, indices = np.divmod(keys, len(self.source))
        size = min(self.config.training.micro_batch or MOST_AT_ONCE, MOST_AT_ONCE)
        parts = [slice(start, start + size) for start in range(0, len(keys), size)]
        return [
            Plan(step, int(views[part][0]), shown, shown, epochs=tuple(views[part].tolist()))
            for step, part in enumerate(parts)
            for shown in [tuple(indices[part].tolist())]
        ]

    def keys(self, role: str = "teacher") -> Keys:
        """One of each sample that the run reads, of its first view: view x length + index, by index."""
        own = teacher_views(self.config, self.method).get(role)
        wanted = wanted_keys(self.config, self.method, self.source, own, whole=False) if own else self.wanted
        keys = wanted.listed()
        _, first = np.unique(keys % len(self.source), return_index=True)
        return keys[first]

    def _builder(self, role: str) -> BatchBuilder:
        config, method = self.config, self.method
        assert config.data.views is not None
        labels = {LABELS: method.extras[LABELS]} if LABELS in method.extras else {}
        reads = method.teachers[role].reads  # a momentum teacher reads what the student does
        return BatchBuilder(
            self.source,
            teacher_views(config, method).get(role, config.data.views),
            {reads: readers_of(method, config)[reads]},
            seed=config.seed,
            on_bad_sample=config.data.on_bad_sample,
            stored={role: self.stored[role]} if role in self.stored else {},
            extras=labels,
            texts=self.texts,
            streams=read_streams(config, self.source),
        )

    def _answered(self, batch: Batch, role: str, towers: tuple[Tower, ...], device: torch.device) -> Answered:
        needs = LevelRequest(towers=towers)
        with as_in_training(device, self.config.training.precision):
            teacher = self.method.teachers[role]
            features: Features = teacher(batch.only(teacher.reads).to(device), needs)
        labels = batch.extra.get(LABELS, torch.full((len(batch),), NO_LABEL))
        return Answered(
            features.image.embedding.float(), features.text.embedding.float(), sample_keys(batch.ids), labels
        )

    def _widths(self, role: str, towers: tuple[Tower, ...]) -> tuple[int, int]:
        width = self.method.teachers[role].embed_dim
        return width if "image" in towers else 0, width if "text" in towers else 0


def _of_all(own: Answered | None, size: int, widths: tuple[int, int], device: torch.device) -> Iterator[Answered]:
    """The parts of all processes in a round, in the order of the processes, on the CPU; one may have nothing."""
    if own is None:
        nothing = torch.empty(0, dtype=torch.long)
        own = Answered(torch.empty(0, widths[0]), torch.empty(0, widths[1]), nothing, nothing)
    columns = [
        gather_rows(_filled_up(column.to(device), size)).cpu()
        for column in (own.image[:, : widths[0]], own.text[:, : widths[1]], own.keys, own.labels)
    ]
    for start in range(0, len(columns[2]), size):
        rows = columns[2][start : start + size] != _NO_KEY
        if bool(rows.any()):
            yield Answered(*(column[start : start + size][rows] for column in columns))


def _filled_up(rows: Float[Tensor, "rows ..."] | Int[Tensor, " rows"], size: int) -> Tensor:
    """With rows of -1 behind, as many as all processes send."""
    return torch.cat([rows, rows.new_full((size - len(rows), *rows.shape[1:]), _NO_KEY)])

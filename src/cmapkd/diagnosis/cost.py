"""What a run will cost: time and memory of a few real steps, size and gain of a cache."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState

from cmapkd.cache import DEFAULT_VIEWS, CacheConfig
from cmapkd.cache.cost import measure
from cmapkd.config import counted, in_bytes
from cmapkd.data.batches import BatchBuilder, Choice
from cmapkd.data.plans import PlanSampler
from cmapkd.data.types import BadSampleError, Batch, Source
from cmapkd.diagnosis.finding import Finding
from cmapkd.methods import Method
from cmapkd.methods.generative import GenerativeMethod
from cmapkd.models.reading import reader_of
from cmapkd.run import RunConfig, plan_cache, read_streams, readers_of, survey_of, teacher_views
from cmapkd.training.optim import make_optimizer
from cmapkd.training.peak_memory import peak_bytes

WARM_STEPS, MEASURED_STEPS = 1, 4


def device_of(config: RunConfig) -> torch.device:
    """Where the run would train."""
    return torch.device("cuda" if torch.cuda.is_available() and config.training.device == "auto" else "cpu")


def build_targets(method: Method, source: Source, config: RunConfig, texts: Choice) -> Finding:
    """Lets the method build its targets of what the measured steps read, and predicts how long the whole run's take.

    Its teachers are on the device.

    A problem is one of the whole run too only if that reads no more; else it is a note.
    """
    PartialState(cpu=device_of(config).type == "cpu")
    steps = {"steps": WARM_STEPS + MEASURED_STEPS, "epochs": None, "stages": ()}
    few = config.model_copy(update={"training": config.training.model_copy(update=steps)})
    surveys = [survey_of(each, method, source, {}, texts) for each in (few, config)]
    here, whole = (len(survey.keys()) for survey in surveys)
    start = time.perf_counter()
    try:
        method.prepare(surveys[0])
    except ValueError as error:
        return Finding("problem" if whole <= here else "note", "targets", f"of {counted(here, 'sample')}: {error}")
    each = (time.perf_counter() - start) / max(1, here)
    most = f"of at most {counted(whole, 'sample')}, in at most about {_duration(each * whole)} without a cache"
    return Finding("ok", "targets", f"built before the first step, {most}")


def measure_steps(method: Method, source: Source, config: RunConfig, texts: Choice) -> Iterator[Finding]:
    """Time and memory of a few real steps, and what they predict for the whole run."""
    assert config.data.views is not None
    device = device_of(config)
    method.to(device)
    method.micro_batch = config.training.micro_batch
    for teacher in method.teachers.values():
        teacher.to(device)
    if method.prepares:
        targets = build_targets(method, source, config, texts)
        yield targets
        if targets.level != "ok":
            return
    try:
        streams = read_streams(config, source)
        sampler = PlanSampler(
            len(source),
            batch_size=config.training.batch_size,
            seed=config.seed,
            start=0,
            stop=WARM_STEPS + MEASURED_STEPS,
            streams=streams,
        )
    except ValueError as error:
        yield Finding("problem", "steps", str(error))
        return
    models = readers_of(method, config)
    builder = BatchBuilder(
        source,
        config.data.views,
        models,
        seed=config.seed,
        extras=method.extras,
        texts=texts,
        more_views=method.more_views,
        view_specs=config.data.more_views,
        own_views=teacher_views(config, method),
        streams=streams,
    )
    optimizer = make_optimizer(method, config.optim)
    loading: list[float] = []
    computing: list[float] = []
    loss = float("nan")
    try:
        for plan in sampler:
            start = time.perf_counter()
            batch = builder[plan]
            loaded = time.perf_counter()
            batch = batch.to(device, images=method.micro_batch is None)
            loss = _step(method, optimizer, batch, bf16=config.training.precision == "bf16")
            loading.append(loaded - start)
            computing.append(time.perf_counter() - loaded)
    except (BadSampleError, torch.OutOfMemoryError, RuntimeError) as error:
        yield Finding("problem", "steps", f"{type(error).__name__}: {error}")
        return
    total = config.training.num_steps(sampler.steps_per_epoch)
    read, compute = statistics.median(loading[WARM_STEPS:]), statistics.median(computing[WARM_STEPS:])
    step = max(compute, read / config.data.workers) if config.data.workers else compute + read
    rate = config.training.batch_size / step
    speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    yield Finding(
        "ok" if loss == loss else "problem",
        "steps",
        f"{1000 * compute:.0f} ms to compute and {1000 * read:.0f} ms to read a batch of {config.training.batch_size} "
        f"here: about {speed} pairs/s, {_duration(step * total)} for {total:,} steps; loss {loss:.3f} after "
        f"{WARM_STEPS + MEASURED_STEPS}",
    )
    if read > compute * max(1, config.data.workers):
        needed = min(32, round(read / compute) + 1)
        yield Finding("note", "steps", f"reading is slower than computing: data.workers={needed} would hide it")
    peak = peak_bytes(device)
    kind = "GPU" if device.type == "cuda" else "process"
    if isinstance(method, GenerativeMethod):
        yield _parts_of_step(method, batch, compute)
    yield Finding("ok", "memory", f"{kind} peak {peak / 2**30:.2f} GiB")


@torch.no_grad()
def _parts_of_step(method: GenerativeMethod, batch: Batch, compute: float) -> Finding:
    """Seconds of the teacher, and of the student's own answers in the last step; the rest of a step is the student."""
    start = time.perf_counter()
    method.read_teacher(batch)
    if method.device.type == "cuda":
        torch.cuda.synchronize(method.device)
    parts = {"the teacher": time.perf_counter() - start} if method.teachers else {}
    if (wrote := method.measurements.get("rollouts/seconds")) is not None:
        parts["answers of the student's own"] = float(wrote)
    parts["the student"] = max(0.0, compute - sum(parts.values()))
    told = ", ".join(f"{1000 * seconds:.0f} ms {part}" for part, seconds in parts.items())
    return Finding("ok", "parts of a step", told)


def predict_disk(method: Method, config: RunConfig) -> Iterator[Finding]:
    """What a run leaves on the disk while it trains: checkpoints with the optimiser's state, and the student."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in method.state_dict().values())
    moments = 2 * sum(each.numel() * each.element_size() for each in method.parameters() if each.requires_grad)
    student = sum(each.numel() * each.element_size() for each in method.student.state_dict().values())
    averaged = config.training.ema is not None or config.training.mean_every is not None
    checkpoint = weights + moments + (student if averaged else 0)
    kept = config.training.keep_checkpoints + 1 + (config.training.evaluate_every is not None)
    total, free = kept * checkpoint + student, shutil.disk_usage(Path.cwd()).free
    detail = (
        f"up to {in_bytes(total)} in the run folder: {kept} checkpoints of {in_bytes(checkpoint)} at once, and the "
        f"student; this folder's disk has {in_bytes(free)} left"
    )
    yield Finding("problem" if total > free else "ok", "disk", detail)


def predict_cache(role: str, method: Method, source: Source, config: RunConfig) -> Iterator[Finding]:
    """Size of a teacher's cache, and from how many epochs on it pays."""
    what = "cache" if role == "teacher" else f"cache of {role}"
    settings = config.cache
    if method.not_cached is not None:
        level: Literal["note", "problem"] = "note" if settings is None else "problem"
        yield Finding(level, what, f"none can serve this method as it is set: {method.not_cached}")
        return
    if settings is None:  # what it would be
        values = {**config.plain(), "cache": CacheConfig().model_dump(mode="json")}
        config = RunConfig.from_mapping(values)
    assert config.data.views is not None
    device = device_of(config)
    try:
        plan = plan_cache(config, method, source, role=role)
        size = len(plan.keys) * plan.layout.row_bytes
        missing = size if settings is None else plan.bytes_missing()
        cost = measure(plan, device=device)
    except (ValueError, RuntimeError, OSError) as error:
        yield Finding("problem" if settings is not None else "note", what, str(error))
        return
    per_epoch = len(source) // config.training.batch_size
    epochs = config.training.num_steps(per_epoch) / per_epoch
    views = plan.views.num_views or DEFAULT_VIEWS
    alike = reader_of(plan.teacher.model).looks == reader_of(method.student).looks
    prepared = not alike or config.data.teacher_view != "same"
    live = cost.answer + (cost.prepare if prepared else 0.0)
    detail = (
        f"{'cache: auto would store' if settings is None else 'it stores'} {in_bytes(size)}"
        f"{'' if missing == size else f', of which {in_bytes(missing)} are to be built'} ({len(plan.keys):,} "
        f"rows of {plan.layout.row_bytes:,} bytes, {plan.layout.short}); here a pair takes the "
        f"teacher {1000 * live:.2f} ms live, {1000 * cost.build:.2f} ms to store and {1000 * cost.read:.3f} ms to read"
    )
    if settings is not None and missing > settings.max_gib * 2**30:
        yield Finding("problem", what, f"{detail}. That is more than cache.max_gib {settings.max_gib:g}")
        return
    if live <= cost.read:
        yield Finding("ok" if settings is None else "note", what, f"{detail}: it does not pay")
        return
    pays = views * cost.build / (live - cost.read)
    detail += (
        f". With {counted(views, 'view')} it pays from {pays:.1f} epochs on, over all runs that share it; this "
        f"run has {epochs:.3g}"
    )
    yield Finding("note" if settings is not None and epochs < pays else "ok", what, detail)


def _step(method: Method, optimizer: torch.optim.Optimizer, batch: Batch, *, bf16: bool) -> float:
    method.train()
    device = method.student.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        terms = method(batch)
    loss = sum(
        (term.weight * term.value for term in terms.values()),
        start=torch.zeros((), device=device),
    )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

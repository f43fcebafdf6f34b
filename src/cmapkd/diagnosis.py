"""What `cmapkd doctor` finds: everything about a recipe that can be known before hours are spent on it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch

from cmapkd.cache import DEFAULT_VIEWS, CacheConfig
from cmapkd.cache.cost import measure
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.open import open_source
from cmapkd.data.plans import PlanSampler
from cmapkd.data.records import iter_captions
from cmapkd.data.streams import streams_of
from cmapkd.data.texts import TextChoice
from cmapkd.data.types import BadSampleError, Batch, Source
from cmapkd.methods import Method
from cmapkd.models import DualEncoder, FrozenTeacher, build_model
from cmapkd.objectives.common import unit
from cmapkd.run import (
    RunConfig,
    build_student,
    classes_of,
    heads_of,
    method_of,
    open_training,
    plan_cache,
    readers,
    texts_of,
)
from cmapkd.training.optim import make_optimizer
from cmapkd.training.peak_memory import peak_bytes

CHECKED_SAMPLES = 64  # read from the start, the middle and the end of each source
SANITY_PAIRS = 32
WARM_STEPS, MEASURED_STEPS = 1, 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A `problem` would stop or spoil the run; a `note` is worth knowing."""

    level: Literal["ok", "note", "problem"]
    what: str
    detail: str


def diagnose(config: RunConfig) -> list[Finding]:
    """Builds everything the recipe names, reads some data, takes a few steps, and writes nothing.

    Returns:
        Findings in the order of a run. After a problem with a part, what depends on it is left out.
    """
    findings: list[Finding] = []
    sources: dict[str, Source] = {}
    for role, name in (("train", config.data.train), ("val", config.data.val), ("test", config.data.test)):
        if name is None:
            continue
        opened = partial(open_training, config) if role == "train" else partial(open_source, name, split=role)
        source = _attempt(findings, f"data.{role}", opened)
        if source is not None:
            sources[role] = source
            findings += _check_source(role, source, config)
    if config.data.final is None:
        findings.append(Finding("note", "data", "neither val nor test is named: the run ends without scores"))
    if "train" not in sources:
        return findings
    train = sources["train"]
    torch.manual_seed(config.seed)
    teachers: dict[str, DualEncoder] = {}
    for role, model in config.teachers.items():
        teacher = _attempt(findings, _named(role), partial(build_model, model))
        if teacher is not None:
            teachers[role] = teacher
    if len(teachers) < len(config.teachers):
        return findings
    frozen = {role: FrozenTeacher(teacher, role) for role, teacher in teachers.items()}
    student = _attempt(findings, "student", partial(build_student, config, train, frozen))
    if student is None:
        return findings
    findings += _check_model("student", student, train)
    for role, teacher in teachers.items():
        findings += _check_model(_named(role), teacher, train)
        findings += _compare(student, teacher)
        findings += _check_teacher_sanity(_named(role), teacher, train)
    num_findings = len(findings)
    heads = partial(heads_of, config, train)
    _attempt(findings, "heads", partial(heads, student))  # a problem of theirs bears their name
    classes = _attempt(findings, "classes", partial(classes_of, config, train))
    if len(findings) > num_findings:
        return findings
    method = _attempt(findings, "method", partial(method_of, config, student, frozen, heads, classes))
    texts = None if method is None else _attempt(findings, "texts", partial(texts_of, config, method, train))
    if method is not None and texts is not None:
        if len(train) >= config.training.batch_size:
            for role in method.teachers:
                findings += _predict_cache(role, method, train, config)
        findings += _measure_steps(method, train, config, texts)
    return findings


def _named(role: str) -> str:
    """How a teacher is called where there may be several."""
    return role if role == "teacher" else f"teacher {role}"


def _attempt(findings: list[Finding], what: str, build: Callable[[], T]) -> T | None:
    """The built part, or None and a problem that says why."""
    try:
        return build()
    except (ValueError, OSError) as error:
        findings.append(Finding("problem", what, str(error)))
        return None


def _check_source(role: str, source: Source, config: RunConfig) -> Iterator[Finding]:
    length = len(source)
    step = max(1, length // CHECKED_SAMPLES)
    indices = range(0, length, step)[:CHECKED_SAMPLES]
    bad: list[BadSampleError] = []
    captions: list[int] = []
    sizes: list[int] = []
    labelled = 0
    for index in indices:
        try:
            sample = source[index]
        except BadSampleError as error:
            bad.append(error)
            continue
        captions.append(len(sample.captions))
        sizes.append(min(sample.image.size))
        labelled += sample.label is not None
    what = f"data.{role}"
    if captions:
        yield Finding(
            "ok",
            what,
            f"{length:,} samples; of {len(captions)} read: {statistics.mean(captions):.1f} captions each, short side "
            f"{min(sizes)}-{max(sizes)} px, {labelled} with a label",
        )
    if bad:
        share = len(bad) / len(indices)
        level: Literal["note", "problem"] = "problem" if share > config.data.max_bad_share else "note"
        yield Finding(
            level, what, f"{len(bad)} of {len(indices)} samples cannot be used ({100 * share:.1f} %), first: {bad[0]}"
        )
    if role == "train":
        if length < config.training.batch_size:
            yield Finding(
                "problem",
                what,
                f"{length} samples do not fill one batch of {config.training.batch_size}: lower training.batch_size",
            )
        elif captions and not all(captions) and config.method.reads_captions:
            yield Finding(
                "problem", what, f"{captions.count(0)} of {len(captions)} samples have no caption to train on"
            )


def _check_model(role: str, model: DualEncoder, source: Source) -> Iterator[Finding]:
    spec = model.image_spec
    levels = f"{len(model.image_levels)} image and {len(model.text_levels)} text levels"
    yield Finding(
        "ok",
        role,
        f"{model.name}: {model.num_parameters():,} parameters, {spec.size} px ({spec.fit}, {spec.interpolation}, mean "
        f"{_numbers(spec.mean)}, std {_numbers(spec.std)}), joint width {model.embed_dim}, {levels}",
    )
    texts = list(itertools.islice(iter_captions(source), 4 * SANITY_PAIRS))
    if not texts:
        return
    tokens = model.tokenizer(texts)
    full = (tokens.mask.sum(1) >= model.tokenizer.context_length).float().mean().item()
    detail = (
        f"vocabulary {model.tokenizer.vocab_size:,}, longest of {len(texts)} captions "
        f"{int(tokens.mask.sum(1).max())} of {model.tokenizer.context_length} tokens"
    )
    if full > 0.05:
        yield Finding("note", f"{role} tokenizer", f"{detail}; {100 * full:.0f} % fill the context and may be cut off")
    else:
        yield Finding("ok", f"{role} tokenizer", detail)


def _compare(student: DualEncoder, teacher: DualEncoder) -> Iterator[Finding]:
    ratio = teacher.num_parameters() / student.num_parameters()
    level: Literal["ok", "note"] = "ok" if ratio > 1 else "note"
    yield Finding(level, "pair", f"the student has {1 / ratio:.1%} of the teacher's parameters ({ratio:.1f}x smaller)")
    if student.embed_dim != teacher.embed_dim:
        yield Finding(
            "ok",
            "pair",
            f"joint widths differ ({student.embed_dim} and {teacher.embed_dim}): linear projections are trained",
        )
    if student.image_spec != teacher.image_spec:
        yield Finding("ok", "pair", "image preprocessing differs: each model prepares the same view its own way")
    if student.image_spec.size > teacher.image_spec.size:
        yield Finding(
            "note",
            "pair",
            f"the student sees {student.image_spec.size} px, more than its teacher's {teacher.image_spec.size}",
        )


@torch.no_grad()
def _check_teacher_sanity(what: str, teacher: DualEncoder, source: Source) -> Iterator[Finding]:
    """How often a teacher finds the right caption among a few: a broken checkpoint or normalisation shows here."""
    images, texts = [], []
    for index in range(0, len(source), max(1, len(source) // SANITY_PAIRS)):
        try:
            sample = source[index]
        except BadSampleError:
            continue
        if sample.captions:
            images.append(teacher.image_spec(sample.image))
            texts.append(sample.captions[0])
        if len(texts) == SANITY_PAIRS:
            break
    if len(texts) < 2:
        return
    image = unit(teacher.encode_image(torch.stack(images)).embedding)
    text = unit(teacher.encode_text(teacher.tokenizer(texts)).embedding)
    similarity = image @ text.T
    right = (similarity.argmax(1) == torch.arange(len(texts))).float().mean().item()
    detail = (
        f"finds the right one of {len(texts)} captions for {100 * right:.0f} % of the images "
        f"(chance {100 / len(texts):.0f} %)"
    )
    if right < 3 / len(texts):
        yield Finding("problem", f"{what} sanity", f"{detail}: check its weights, preprocessing and tokenizer")
    else:
        yield Finding("ok", f"{what} sanity", detail)


def _measure_steps(method: Method, source: Source, config: RunConfig, texts: TextChoice) -> Iterator[Finding]:
    """Time and memory of a few real steps, and what they predict for the whole run."""
    assert config.data.views is not None
    device = torch.device("cuda" if torch.cuda.is_available() and config.training.device == "auto" else "cpu")
    method.to(device)
    method.micro_batch = config.training.micro_batch
    for teacher in method.teachers.values():
        teacher.to(device)
    try:
        sampler = PlanSampler(
            len(source),
            batch_size=config.training.batch_size,
            seed=config.seed,
            start=0,
            stop=WARM_STEPS + MEASURED_STEPS,
            streams=streams_of(source),
        )
    except ValueError as error:
        yield Finding("problem", "steps", str(error))
        return
    models = readers(method.student, *method.teachers.values())
    builder = BatchBuilder(
        source,
        config.data.views,
        models,
        seed=config.seed,
        extras=method.extras,
        texts=texts,
        more_views=method.more_views,
        view_specs=config.data.more_views,
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
    yield Finding(
        "ok" if loss == loss else "problem",
        "steps",
        f"{1000 * compute:.0f} ms to compute and {1000 * read:.0f} ms to read a batch of {config.training.batch_size} "
        f"here: about {rate:,.0f} pairs/s, {_duration(step * total)} for {total:,} steps; loss {loss:.3f} after "
        f"{WARM_STEPS + MEASURED_STEPS}",
    )
    if read > compute * max(1, config.data.workers):
        needed = min(32, round(read / compute) + 1)
        yield Finding("note", "steps", f"reading is slower than computing: data.workers={needed} would hide it")
    peak = peak_bytes(device)
    kind = "GPU" if device.type == "cuda" else "process"
    yield Finding("ok", "memory", f"{kind} peak {peak / 2**30:.2f} GiB")


def _predict_cache(role: str, method: Method, source: Source, config: RunConfig) -> Iterator[Finding]:
    """Size of a teacher's cache, and from how many epochs on it pays."""
    what = "cache" if role == "teacher" else f"cache of {role}"
    settings = config.cache
    if settings is None:  # what it would be
        values = {**config.plain(), "cache": CacheConfig().model_dump(mode="json")}
        config = RunConfig.from_mapping(values)
    assert config.data.views is not None
    device = torch.device("cuda" if torch.cuda.is_available() and config.training.device == "auto" else "cpu")
    try:
        plan = plan_cache(config, method, source, role=role)
        size = len(plan.keys) * plan.layout.row_bytes
        cost = measure(plan, device=device)
    except (ValueError, RuntimeError, OSError) as error:
        yield Finding("problem" if settings is not None else "note", what, str(error))
        return
    per_epoch = len(source) // config.training.batch_size
    epochs = config.training.num_steps(per_epoch) / per_epoch
    views = config.data.views.num_views or DEFAULT_VIEWS
    prepared = plan.teacher.model.image_spec != method.student.image_spec
    live = cost.answer + (cost.prepare if prepared else 0.0)
    detail = (
        f"{'cache: auto would store' if settings is None else 'it stores'} {size / 2**30:.3f} GiB ({len(plan.keys):,} "
        f"rows of {plan.layout.row_bytes:,} bytes, {plan.layout.kind} in {plan.layout.store}); here a pair takes the "
        f"teacher {1000 * live:.2f} ms live, {1000 * cost.build:.2f} ms to store and {1000 * cost.read:.3f} ms to read"
    )
    if settings is not None and size > settings.max_gib * 2**30:
        yield Finding("problem", what, f"{detail}. That is more than cache.max_gib {settings.max_gib:g}")
        return
    if live <= cost.read:
        yield Finding("ok" if settings is None else "note", what, f"{detail}: it does not pay")
        return
    pays = views * cost.build / (live - cost.read)
    detail += (
        f". With {views} view{'s'[: views > 1]} it pays from {pays:.1f} epochs on, over all runs that share it; this "
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


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3g}" for value in values)

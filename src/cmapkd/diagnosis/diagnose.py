"""Everything about a recipe that can be known before hours are spent on it, in the order of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch

from cmapkd.data.open import open_source
from cmapkd.data.types import Source
from cmapkd.diagnosis.cost import device_of, measure_steps, predict_cache, predict_disk
from cmapkd.diagnosis.data import check_order, check_overlap, check_source
from cmapkd.diagnosis.finding import Finding
from cmapkd.diagnosis.models import (
    check_activation,
    check_classifier,
    check_model,
    check_sanity,
    check_size,
    check_weights,
    compare_sizes,
)
from cmapkd.diagnosis.writing import (
    Asked,
    check_common,
    check_dialogues,
    check_looks,
    check_start,
    check_top,
    check_writer,
    compare_writers,
    padding_share,
)
from cmapkd.methods.generative import GenerativeMethod
from cmapkd.models import Classifier, DualEncoder, FrozenTeacher, GenerativeModel, Model, build_model
from cmapkd.run import (
    RunConfig,
    build_student,
    check_training,
    check_words,
    classes_of,
    heads_of,
    method_of,
    open_training,
    texts_of,
)

T = TypeVar("T")
Say = Callable[[str], None]
"""Is told what is looked at next, before it takes its time."""


def diagnose(config: RunConfig) -> list[Finding]:
    """All findings of `examine`."""
    return [*examine(config)]


def examine(config: RunConfig, say: Say = lambda _: None) -> Iterator[Finding]:
    """Builds everything the recipe names, reads some data, takes a few steps, and writes nothing.

    Yields:
        Findings in the order of a run, each as soon as it is known. After a problem with a part, what depends on it is
        left out.
    """
    sources: dict[str, Source] = {}
    for role, name in (("train", config.data.train), ("val", config.data.val), ("test", config.data.test)):
        if name is None:
            continue
        say(f"reading {name}")
        opened = partial(open_training, config) if role == "train" else partial(open_source, name, split=role)
        source, problem = _attempt(f"data.{role}", opened)
        if problem is not None:
            yield problem
        if source is not None:
            sources[role] = source
            yield from check_source(role, source, config)
            if role == "test" or (role == "val" and (config.data.test is None or config.training.evaluate_every)):
                _, problem = _attempt("evaluation", partial(check_words, config, f"data.{role}", source))
                if problem is not None:
                    yield problem
    yield from check_overlap(sources)
    if config.data.final is None:
        yield Finding("note", "data", "neither val nor test is named: the run ends without scores")
    if "train" in sources:
        yield from check_order(sources["train"], config)
        yield from check_warmup(config, sources["train"])
        yield from _models(config, sources["train"], say)


def check_warmup(config: RunConfig, train: Source) -> Iterator[Finding]:
    """Whether the learning rate gets to its peak, and has steps left to come down from it."""
    steps = config.training.num_steps(max(1, len(train) // config.training.batch_size))
    warmup = config.optim.warmup_steps
    if 2 * warmup <= steps:
        return
    ends = "the rate never reaches its peak" if warmup >= steps else "more than half of the run warms up"
    yield Finding(
        "note",
        "warm-up",
        f"{warmup:,} of {steps:,} steps: {ends}. Take more steps, or set optim.warmup_steps to {max(1, steps // 10)}",
    )


def _models(config: RunConfig, train: Source, say: Say) -> Iterator[Finding]:
    """The models, and then the training that they are for."""
    torch.manual_seed(config.seed)
    teachers: dict[str, Model] = {}
    for role, model in config.teachers.items():
        say(f"loading teacher {model.name}")
        teacher, problem = _attempt(_named(role), partial(build_model, model))
        if problem is not None:
            yield problem
        if teacher is not None:
            teachers[role] = teacher
    if len(teachers) < len(config.teachers):
        return
    frozen = {role: FrozenTeacher(teacher, role) for role, teacher in teachers.items()}
    say(f"building student {config.student.name}")
    student, problem = _attempt("student", partial(build_student, config, train, frozen))
    if student is None:
        assert problem is not None
        yield problem
        return
    asked = None
    if config.writes:
        asked = Asked.of(train, config.data.prompts.prompting())
        for judged in (student, *teachers.values()):
            judged.to(device_of(config))  # answers of large models are judged there
    yield from _of_student(config, student, train, asked)
    for role, teacher in teachers.items():
        say(f"asking teacher {teacher.name}")
        yield from _of_teacher(config, _named(role), teacher, student, train, asked)
    yield from _training(config, train, student, frozen, asked, say)


def _of_student(config: RunConfig, student: Model, train: Source, asked: Asked | None) -> Iterator[Finding]:
    limits: dict[str, Any] = {"max_tokens": config.data.max_tokens, "max_bad_share": config.data.max_bad_share}
    if isinstance(student, GenerativeModel) and asked is not None:
        yield from check_writer("student", student)
        yield from check_weights("student", student, teaches=False, learning=config.training.train_parts)
        yield from check_dialogues("student", student, asked, **limits)
        yield from check_start(student, asked)
    elif isinstance(student, Classifier):
        yield from check_classifier("student", student)
        yield from check_weights("student", student, teaches=False, learning=config.training.train_parts)
    elif isinstance(student, DualEncoder):
        yield from check_model("student", student, train)
        yield from check_weights("student", student, teaches=False, learning=config.training.train_parts)
        yield from check_size("student", student)
        yield from check_activation("student", student, train)


def _of_teacher(
    config: RunConfig, what: str, teacher: Model, student: Model, train: Source, asked: Asked | None
) -> Iterator[Finding]:
    """What a teacher is, alone and beside the student; the method refuses one of the other contract."""
    limits: dict[str, Any] = {"max_tokens": config.data.max_tokens, "max_bad_share": config.data.max_bad_share}
    if isinstance(teacher, GenerativeModel) and asked is not None:
        yield from check_writer(what, teacher)
        yield from check_weights(what, teacher, teaches=True)
        yield from check_dialogues(what, teacher, asked, **limits)
        if isinstance(student, GenerativeModel):
            by_bytes = config.method.reads_bytes
            yield from compare_writers(student, teacher, by_bytes=by_bytes)
            if not by_bytes:
                yield from check_common(student, teacher, asked, max_bad_share=config.data.max_bad_share)
        yield from check_looks(what, teacher, asked)
    elif isinstance(teacher, DualEncoder) and asked is None:
        yield from check_model(what, teacher, train)
        yield from check_weights(what, teacher, teaches=True)
        if "text" not in teacher.towers:
            return
        yield from check_size(what, teacher)
        if isinstance(student, DualEncoder):
            yield from compare_sizes(student, teacher)
        yield from check_activation(what, teacher, train)
        yield from check_sanity(what, teacher, train)
    elif not isinstance(teacher, DualEncoder) or "image" in teacher.random_towers:
        # of the other kind than the student, so nothing compares the two, and texts of an encoder are not read
        yield from check_weights(what, teacher, teaches=True)


def _training(
    config: RunConfig,
    train: Source,
    student: Model,
    teachers: dict[str, FrozenTeacher],
    asked: Asked | None,
    say: Say,
) -> Iterator[Finding]:
    heads, of_heads = partial(heads_of, config, train), None
    if isinstance(student, DualEncoder):
        _, of_heads = _attempt("heads", partial(heads, student))  # a problem of theirs bears their name
    classes, of_classes = _attempt("classes", partial(classes_of, config, train))
    problems = [each for each in (of_heads, of_classes) if each is not None]
    yield from problems
    if problems:
        return
    method, problem = _attempt("method", partial(method_of, config, student, teachers, heads, classes))
    texts = None
    if method is not None:
        texts, problem = _attempt("texts", partial(texts_of, config, method, train))
    if problem is not None:
        yield problem
    if method is None or texts is None:
        return
    if len(train) >= config.training.batch_size:
        _, problem = _attempt("stages and parts", partial(check_training, config, method, train))
        if problem is not None:
            yield problem
            return
        if asked is not None and isinstance(method, GenerativeMethod):
            yield from _of_distributions(method, asked, config)
        for role in (role for role in config.teachers if role in method.teachers):
            say("storing a few answers of the teacher")
            yield from predict_cache(role, method, train, config)
    yield from predict_disk(method, config)
    say("taking a few steps")
    yield from measure_steps(method, train, config, texts)


def _of_distributions(method: GenerativeMethod, asked: Asked, config: RunConfig) -> Iterator[Finding]:
    """What a method reads of its first teacher's distributions, and the padding of its batches."""
    top, first = method.teacher_top, next(iter(method.teachers.values()), None)
    if top is not None and first is not None and isinstance(first.model, GenerativeModel):
        yield from check_top("teacher", first.model, asked, top.number, top.temperature)
    share = 100 * padding_share(method.student, asked, config.training.batch_size)
    yield Finding("ok", "padding", f"{share:.0f} % of a batch's tokens are padding")


def _named(role: str) -> str:
    """How a teacher is called where there may be several."""
    return role if role == "teacher" else f"teacher {role}"


def _attempt(what: str, build: Callable[[], T]) -> tuple[T | None, Finding | None]:
    """The built part; or a problem that says why there is none."""
    try:
        return build(), None
    except (ValueError, OSError) as error:
        return None, Finding("problem", what, str(error).removeprefix(f"{what}: "))

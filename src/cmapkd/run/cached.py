"""What of a run answers from disk: its teachers, and the student's towers that do not learn."""

from __future__ import annotations

from functools import partial
from typing import TypeGuard

from accelerate import PartialState
from rich.console import Console

from cmapkd.cache import DEFAULT_VIEWS, CacheConfig, CachePlan, CacheReader, Wanted, all_keys, keys_of_run
from cmapkd.cache.progress import BuildDisplay
from cmapkd.data.batches import Answers
from cmapkd.data.plans import PlanSampler
from cmapkd.data.texts import TextChoice
from cmapkd.data.types import Source
from cmapkd.data.views import ViewSpec
from cmapkd.methods import Method
from cmapkd.methods.dual import STUDENT, DualEncoderMethod
from cmapkd.methods.stages import stage_ends, stream_by_step
from cmapkd.models import build_teacher
from cmapkd.run.build import read_streams, teacher_views, text_choice
from cmapkd.run.config import RunConfig
from cmapkd.training.processes import wait_for_all


def plan_cache(
    config: RunConfig, method: Method, source: Source, *, whole: bool = False, role: str = "teacher"
) -> CachePlan:
    """What the run asks of a teacher's cache: the rows that it reads, or with `whole` every sample in each view."""
    assert config.data.views is not None
    views = teacher_views(config, method).get(role, config.data.views)
    return CachePlan.of_method(
        config.cache or CacheConfig(),
        method,
        source=source,
        views=views,
        keys=wanted_keys(config, method, source, views, whole=whole),
        precision=config.training.precision,
        role=role,
        texts=text_choice(config, method),
        max_tokens=config.data.max_tokens,
    )


def plan_student_cache(
    config: RunConfig, method: DualEncoderMethod, source: Source, *, whole: bool = False
) -> CachePlan:
    """What the run asks of the student's towers that do not learn; of a method that can read stored answers."""
    assert config.data.views is not None
    texts = text_choice(config, method)
    assert isinstance(texts, TextChoice)  # its student embeds
    return CachePlan.of_student(
        config.cache or CacheConfig(),
        method.student,
        source=source,
        views=config.data.views,
        keys=wanted_keys(config, method, source, config.data.views, whole=whole),
        precision=config.training.precision,
        texts=texts,
    )


def wanted_keys(config: RunConfig, method: Method, source: Source, views: ViewSpec, *, whole: bool) -> Wanted:
    """Of the rows that the run reads, or with `whole` of every sample in each of these views."""
    length, batch_size = len(source), config.training.batch_size
    if whole:
        return all_keys(length, views.num_views or DEFAULT_VIEWS)
    streams, seed = read_streams(config, source), config.seed
    sampler = PlanSampler(length, batch_size=batch_size, seed=seed, start=0, stop=0, streams=streams)
    steps = config.training.num_steps(sampler.steps_per_epoch)
    stages = config.training.stages or method.default_stages
    ends = stage_ends(stages, total=steps, steps_per_epoch=sampler.steps_per_epoch)
    only = stream_by_step(stages, ends)
    return keys_of_run(length, batch_size=batch_size, seed=seed, steps=steps, views=views, streams=streams, only=only)


def reads_stored_student(method: Method) -> TypeGuard[DualEncoderMethod]:
    """Whether the image tower of the method's student is frozen, or its first blocks, so that answers can be stored."""
    if not isinstance(method, DualEncoderMethod) or method.why_student_live is not None:
        return False
    return "image" in method.student.frozen_towers


def student_from_cache(
    config: RunConfig, method: Method, source: Source, console: Console | None
) -> dict[str, Answers]:
    """Builds what is missing of the student's frozen towers, and lets the method read it in their place.

    Returns:
        Nothing where the student's image tower learns, where the student cannot go on from stored features, or where
        the method needs it whole.
    """
    if not isinstance(method, DualEncoderMethod):
        return {}
    student = method.student
    if not reads_stored_student(method):
        reason = method.why_student_live if "image" in student.frozen_towers else student.why_towers_live
        if reason and method.encodes_student and console is not None and PartialState().is_main_process:
            console.print(f"cache: the student's frozen towers answer live: {reason}", highlight=False)
        return {}
    towers = student.frozen_towers
    plan = plan_student_cache(config, method, source)
    reader = _filled(plan, config, console, f"frozen {' and '.join(towers)} of the student answer")
    reader.needs_texts = reader.needs_texts or "text" not in towers
    # these towers were taken apart before any stage began, and share their weights with the student
    method.stored_student = plan.cached_teacher(reader, lambda: plan.teacher.model)
    method.stored_towers, method.stored_levels = towers, student.stored_levels
    return {STUDENT: reader}


def answer_from_cache(config: RunConfig, method: Method, source: Source, console: Console | None) -> dict[str, Answers]:
    """Builds what is missing, if the config lets it, and puts cached teachers into the method; each one's answers."""
    roles = [role for role in config.teachers if role in method.teachers]
    return {role: _answer_from_cache(role, config, method, source, console) for role in roles}


def _answer_from_cache(
    role: str, config: RunConfig, method: Method, source: Source, console: Console | None
) -> Answers:
    plan = plan_cache(config, method, source, role=role)
    reader = _filled(
        plan, config, console, "the teacher answers" if role == "teacher" else f"the teacher {role} answers"
    )
    method.teachers[role] = plan.cached_teacher(reader, partial(build_teacher, config.teachers[role], role))
    return method.answers(role, reader)


def _filled(plan: CachePlan, config: RunConfig, console: Console | None, who: str) -> CacheReader:
    """The cache of a plan, after what is missing was added, if the config lets it.

    Args:
        who: answers, in words.
    """
    assert config.cache is not None
    state = PartialState()
    console = console if state.is_main_process else None
    if config.cache.mode == "auto":
        missing = plan.bytes_missing()
        if console is not None and missing:
            console.print(
                f"cache: {missing / 2**20:,.0f} MiB of {plan.layout.describe()}, into {plan.folder}", highlight=False
            )
        plan.build(
            device=state.device,
            workers=config.data.workers,
            rank=state.process_index,
            world_size=state.num_processes,
            skip_bad=config.data.on_bad_sample == "skip",
            progress=BuildDisplay(console),
            timeout=config.data.timeout,
        )
        wait_for_all()
    reader = plan.open()
    if console is not None:
        console.print(f"cache: {who} from {plan.folder}", highlight=False)
    return reader

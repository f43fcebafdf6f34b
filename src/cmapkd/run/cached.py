"""The teachers of a run that answer from disk."""

from __future__ import annotations

from functools import partial

from accelerate import PartialState
from rich.console import Console

from cmapkd.cache import DEFAULT_VIEWS, CacheConfig, CachePlan, all_keys, keys_of_run
from cmapkd.cache.progress import BuildDisplay
from cmapkd.data.batches import Answers
from cmapkd.data.plans import PlanSampler
from cmapkd.data.streams import streams_of
from cmapkd.data.types import Source
from cmapkd.methods import Method
from cmapkd.methods.stages import stage_ends, stream_by_step
from cmapkd.models import build_model
from cmapkd.run.build import text_choice
from cmapkd.run.config import RunConfig
from cmapkd.training.processes import wait_for_all


def plan_cache(
    config: RunConfig, method: Method, source: Source, *, whole: bool = False, role: str = "teacher"
) -> CachePlan:
    """What the run asks of a teacher's cache: the rows that it reads, or with `whole` every sample in each view."""
    assert config.data.views is not None
    length, views, batch_size = len(source), config.data.views, config.training.batch_size
    if whole:
        keys = all_keys(length, views.num_views or DEFAULT_VIEWS)
    else:
        streams, seed = streams_of(source), config.seed
        sampler = PlanSampler(length, batch_size=batch_size, seed=seed, start=0, stop=0, streams=streams)
        steps = config.training.num_steps(sampler.steps_per_epoch)
        stages = config.training.stages or method.default_stages
        ends = stage_ends(stages, total=steps, steps_per_epoch=sampler.steps_per_epoch)
        only = stream_by_step(stages, ends)
        keys = keys_of_run(
            length, batch_size=batch_size, seed=seed, steps=steps, views=views, streams=streams, only=only
        )
    return CachePlan.of_method(
        config.cache or CacheConfig(),
        method,
        source=source,
        views=views,
        keys=keys,
        precision=config.training.precision,
        role=role,
        texts=text_choice(config, method),
    )


def answer_from_cache(config: RunConfig, method: Method, source: Source, console: Console | None) -> dict[str, Answers]:
    """Builds what is missing, if the config lets it, and puts cached teachers into the method; each one's answers."""
    roles = [role for role in config.teachers if role in method.teachers]
    return {role: _answer_from_cache(role, config, method, source, console) for role in roles}


def _answer_from_cache(
    role: str, config: RunConfig, method: Method, source: Source, console: Console | None
) -> Answers:
    assert config.cache is not None
    state = PartialState()
    plan = plan_cache(config, method, source, role=role)
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
        name = role if role == "teacher" else f"teacher {role}"
        console.print(f"cache: the {name} answers from {plan.folder}", highlight=False)
    method.teachers[role] = plan.cached_teacher(reader, partial(build_model, config.teachers[role]))
    return method.answers(role, reader)

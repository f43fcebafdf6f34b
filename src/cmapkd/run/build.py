"""What a run is made of, from its config: data, models, heads, classes, texts and the method over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cmapkd.config import ConfigError, closest
from cmapkd.data.batches import BatchBuilder, Batches, Choice
from cmapkd.data.held_out import WithHeldOut, open_held_out
from cmapkd.data.labels import any_label
from cmapkd.data.open import open_streams
from cmapkd.data.plans import PlanSampler
from cmapkd.data.prompting import Prompting
from cmapkd.data.readers import Reader
from cmapkd.data.regions import check_boxes
from cmapkd.data.streams import Stream
from cmapkd.data.templates import ClassPrompts, get_templates
from cmapkd.data.texts import TextChoice
from cmapkd.data.types import Source
from cmapkd.data.views import ViewSpec, WholePictures, check_more_views
from cmapkd.evaluation.probes.joint import JointHeads, build_heads
from cmapkd.evaluation.run import with_reference
from cmapkd.evaluation.suite import check_comparable
from cmapkd.methods import AuxiliaryTerms, Method, build_method
from cmapkd.methods.dual import DualEncoderMethod
from cmapkd.methods.generative import GenerativeMethod
from cmapkd.methods.stages import WHOLE_RUN
from cmapkd.methods.unpaired import UnpairedPictures
from cmapkd.models import DualEncoder, FrozenTeacher, Model, Teacher, build_model, build_teacher
from cmapkd.models.reading import reader_of
from cmapkd.run.config import RunConfig
from cmapkd.run.texts import or_prompts, training_texts, vocabulary_captions


def open_training(config: RunConfig) -> Source:
    """What the run learns from: samples with captions, or all where the method reads none."""
    held_out = config.data.held_out
    return open_streams(
        config.data.train,
        config.data.more,
        require_captions=config.method.reads_captions and not config.writes,
        held_out=held_out if isinstance(held_out, int) else 0,
        prompting=config.data.prompts.prompting() if config.writes else None,
    )


def read_streams(config: RunConfig, source: Source) -> tuple[Stream, ...]:
    """The streams of the training data, each with the order in which the run reads it.

    Raises:
        ConfigError: the data have no such order.
    """
    size = config.training.batch_size
    return config.data.ordering.streams(source, length=len(source), batch_size=size, seed=config.seed)


def with_held_out(
    config: RunConfig, method: Method, builder: BatchBuilder, *, rank: int = 0, world_size: int = 1
) -> Batches:
    """The builder, which brings held-out pairs beside its batches where the method reads any and the data name some.

    Raises:
        ConfigError: the method needs such pairs, and the data name none.
    """
    every, data = method.held_out_every, config.data
    if every is None:
        return builder
    if data.held_out is None:
        if method.needs_held_out:
            raise ConfigError(
                f"method {config.method.name}, as it is set, learns from pairs that are never trained on: set "
                "data.held_out to a number of pairs of data.train (512), or to a source"
            )
        return builder
    assert data.views is not None
    source = open_held_out(data.train, data.held_out, require_captions=config.method.reads_captions)
    beside = BatchBuilder(
        source,
        data.views,
        readers(method.student, read=partial(reader_of, fast=data.views.reading == "fast")),
        seed=config.seed,
        on_bad_sample=data.on_bad_sample,
        memory=data.memory,
    )
    size = config.training.batch_size
    return WithHeldOut(
        builder,
        beside,
        every=every,
        batch_size=None if method.held_out_whole else size,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
    )


def load_teachers(config: RunConfig) -> dict[str, FrozenTeacher]:
    """The run's teachers by role, the first one first; none where it has none."""
    return {role: FrozenTeacher(build_teacher(model, role), role) for role, model in config.teachers.items()}


def build_student(config: RunConfig, source: Source, teachers: Mapping[str, FrozenTeacher]) -> Model:
    """The student before its first step.

    Raises:
        ConfigError: its weights are to be stored in half precision, or a task that is named compares it with its
            teacher and cannot.
    """
    if config.student.dtype != "fp32":
        raise ConfigError(
            f"student.dtype is {config.student.dtype}, but weights that learn are kept in fp32: set "
            "training.precision: bf16 to compute in half precision"
        )
    teacher = teachers["teacher"].model if "teacher" in teachers else None
    if config.writes:
        prompting = prompting_of(config)
        whole = config.student.options.get("vocabulary") == "texts"  # then no token of a training text may be missed
        words = prompting.vocabulary(source, len(source)) if whole else prompting.vocabulary(source)
        student = build_model(config.student, captions=words, teacher=teacher)
        _check_beside(config, student, teacher)
        return student
    if config.student.vocabulary == "texts":  # then no token of a training text may be missed
        captions = training_texts(config, source)
    else:
        captions = vocabulary_captions(source)
        if not config.method.reads_captions:
            captions = or_prompts(captions, config, source)
    student = build_model(config.student, captions=captions, teacher=teacher)
    _check_copies(config, student, teachers)
    _check_beside(config, student, teacher)
    return student


def _check_beside(config: RunConfig, student: Model, teacher: Model | None) -> None:
    """Refuses, before the first step, tasks that cannot measure this student beside its teacher.

    Raises:
        ConfigError: names the task, and why.
    """
    beside = with_reference(config.evaluation)
    if beside is not None and teacher is not None:
        check_comparable({"teacher": teacher, "student": student}, beside)


def _check_copies(config: RunConfig, student: Model, teachers: Mapping[str, FrozenTeacher]) -> None:
    """Refuses a teacher that is named as the student is and has other weights, because some are drawn at random.

    Word tables are not compared where the student's was cut. Other models than those of two towers are left to what
    refuses them as teachers.

    Raises:
        ConfigError: names the teacher and the first weight.
    """
    if not isinstance(student, DualEncoder):
        return
    new = student.parts.get("adapters", ())  # they add nothing before the first step, whatever is in them
    own, cut = dict(student.named_parameters()), config.student.vocabulary == "texts"
    copy = config.student.model_copy(update={"vocabulary": "whole"})
    for role, teacher in teachers.items():
        if config.teachers.get(role) != copy:
            continue
        for name, weight in teacher.model.named_parameters():
            if name in new or (cut and weight.shape != own[name].shape):
                continue
            if not torch.equal(weight, own[name]):
                raise ConfigError(
                    f"{role} is the student as it begins, and weights of {student.name} are random, {name} among them: "
                    "give the student trained weights, such as a saved model's, or name another teacher"
                )


def method_of(
    config: RunConfig,
    student: Model,
    teachers: Mapping[str, FrozenTeacher],
    heads: Callable[[Any], AuxiliaryTerms | None] | None = None,
    classes: ClassPrompts | None = None,
) -> Method:
    """The run's method over these models."""
    first, *more = teachers.values() or (None,)
    further = [each for each in more if each is not None]
    silent = tuple(name for name, stream in config.data.more.items() if stream.captions == "none")
    unpaired = UnpairedPictures(silent, config.data.unpaired_weight) if silent else None
    return build_method(
        config.method,
        student=student,
        teacher=first,
        more_teachers=further,
        auxiliary=heads,
        classes=classes,
        unpaired=unpaired if config.method.reads_captions else None,
    )


def check_training(config: RunConfig, method: Method, source: Source) -> Method:
    """The method with the parts frozen that do not learn; refuses what the trainer would, before a cache is built.

    Raises:
        ConfigError: a part, stage, term, view or stream that is not there, data without the boxes that views show, or
            streams that a batch has no room for.
        ValueError: fewer samples than a batch has.
    """
    training, streams = config.training, read_streams(config, source)
    if not method.in_batch:
        _refuse_in_batch(config)
    teacher_views(config, method)  # refuses what does not fit
    check_more_views(method.more_views, config.data.more_views)
    check_boxes(source, method.more_views, config.data.more_views)
    sampler = PlanSampler(
        len(source), batch_size=training.batch_size, seed=config.seed, start=0, stop=0, streams=streams
    )
    if training.train_parts is not None:
        method.train_only(training.train_parts)
    method.check_learning()
    method.check_teachers()
    if method.needs_labels and not any_label(source):
        without = "" if method.label_free is None else f", or set {method.label_free}"
        raise ConfigError(
            f"method {config.method.name}, as it is set, learns from labels, and {source.name} has none: take a "
            f"data.train with labels{without}"
        )
    for name in method.streams:
        _check_stream_of_method(config, name, sampler)
    try:
        training.check_mean(training.num_steps(sampler.steps_per_epoch))
    except ValueError as error:
        raise ConfigError(f"training.{error}") from None
    stages = training.stages or method.default_stages
    method.check_stages(stages)
    for stage in stages:
        if stage.data is not None:
            sampler.check_stream(stage.data)
    return method


def _check_stream_of_method(config: RunConfig, name: str, sampler: PlanSampler) -> None:
    """Refuses data without a stream that the method tells apart.

    Raises:
        ConfigError: names the streams that there are.
    """
    known = [stream.name for stream in sampler.streams]
    if name not in known:
        raise ConfigError(
            f"method {config.method.name} reads stream {name!r}{closest(name, known)}, and the data have "
            f"{', '.join(known)}: name it in data.more, such as data.more.{name}={{source: scenes, share: 0.5, "
            "labels: hidden}"
        )


def _refuse_in_batch(config: RunConfig) -> None:
    """Refuses what is of no use to a method whose terms are sums over samples, each by itself.

    Raises:
        ConfigError: names the setting.
    """
    name, training = config.method.name, config.training
    if training.local_loss is True:
        raise ConfigError(
            f"training.local_loss shares out the rows of in-batch losses, and method {name} has none: leave it out"
        )
    if training.compile:
        raise ConfigError(
            f"training.compile is not supported with method {name} in this version: the number of its rows changes "
            "with every batch. Leave it out"
        )
    if training.shard_teacher:
        raise ConfigError(
            f"training.shard_teacher takes a teacher's head apart after each pass, and method {name} reads the head "
            "behind it: leave it out"
        )
    if config.heads is not None:
        raise ConfigError(
            f"heads learn on pictures that a student embeds, and method {name} trains none: leave heads out"
        )


def texts_of(config: RunConfig, method: Method, source: Source) -> Choice:
    """Which texts of a sample the run reads.

    Raises:
        ConfigError: the training data do not have them.
    """
    choice = text_choice(config, method)
    choice.check(source)
    return choice


def text_choice(config: RunConfig, method: Method) -> Choice:
    """How a sample's texts are chosen: its prompt and answer for a method over models that write, else captions."""
    if config.writes:
        return prompting_of(config)
    return TextChoice(method.text_pools, config.data.mix_synthetic, required=config.method.reads_captions)


def prompting_of(config: RunConfig) -> Prompting:
    """The dialogues that a run over models that write learns from; in pairs where a stage wants a term of pairs."""
    stages = config.training.stages or (WHOLE_RUN,)
    pairs = any(stage.wants_term(name) for name in config.method.pair_terms for stage in stages)
    return replace(config.data.prompts.prompting(), pairs=pairs)


def heads_of(config: RunConfig, source: Source, student: DualEncoder) -> JointHeads | None:
    """The heads that learn with the student; None where the config asks for none."""
    if config.heads is None:
        return None
    template = (get_templates(config.evaluation.templates, source) or ("{}",))[0]
    return build_heads(config.heads, student=student, source=source, template=template, seed=config.seed)


def readers(
    student: Model, *teachers: Teacher | None, read: Callable[[Model], Reader] = reader_of
) -> dict[str, Reader]:
    """How each model of a run reads a batch; a momentum teacher reads what the student reads."""
    given = [teacher for teacher in teachers if teacher is not None and teacher.reads == teacher.role]
    models = {"student": student} | {teacher.role: teacher.model for teacher in given}
    return {role: read(model) for role, model in models.items()}


def teacher_views(config: RunConfig, method: Method) -> dict[str, ViewSpec]:
    """By role, what teachers see in place of the student's views; empty where they see the same.

    Raises:
        ConfigError: the method compares places of the pictures, has no teacher of its own, or trains a model that
            writes.
    """
    views = config.data.views
    if config.data.teacher_view == "same" or views is None:
        return {}
    roles = [role for role, teacher in method.teachers.items() if teacher.reads == teacher.role]
    if not isinstance(method, DualEncoderMethod) or not roles:
        raise ConfigError(
            f"data.teacher_view: whole is for frozen teachers of two towers, and method {config.method.name} has none "
            "here: leave it out"
        )
    needs = method.teacher_needs
    if method.compares_places:
        raise ConfigError(
            "data.teacher_view: whole shows teachers another part of a picture than the student's, and method "
            f"{config.method.name}, as it is set, compares both place by place: leave it out, or give such terms a "
            "weight of zero"
        )
    first = next(iter(method.teachers))
    return {
        role: WholePictures.of(views, once=role == first and "text" not in needs.towers and not needs.text_levels)
        for role in roles
    }


def readers_of(method: Method, config: RunConfig) -> dict[str, Reader]:
    """The readers of a method's models. Where next tokens are compared, answers have only tokens that both know."""
    num_tokens = method.num_tokens if isinstance(method, GenerativeMethod) else None
    assert config.data.views is not None
    read = partial(
        reader_of,
        max_tokens=config.data.max_tokens,
        num_tokens=num_tokens,
        pictures_alone=config.training.sharding == "fsdp2",
        fast=config.data.views.reading == "fast",
        spans=isinstance(method, DualEncoderMethod) and method.needs_spans,
    )
    return readers(method.student, *method.teachers.values(), read=read)

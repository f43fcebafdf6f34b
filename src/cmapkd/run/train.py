"""One training of a run, from its sources to the saved student; and a student out of one of its checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console

from cmapkd.config import ConfigError, writing
from cmapkd.data.batches import Answers, BatchBuilder, Batches, Choice
from cmapkd.data.plans import check_length
from cmapkd.data.types import Source
from cmapkd.evaluation.probes.joint import JointHeads
from cmapkd.methods import Method
from cmapkd.models import DualEncoder, FrozenTeacher, Model, MomentumTeacher, build_teacher
from cmapkd.models.activation import assumption
from cmapkd.models.load import check_name
from cmapkd.models.parts import word_tables
from cmapkd.models.untrained import note_trained
from cmapkd.run.build import (
    build_student,
    check_training,
    heads_of,
    method_of,
    open_training,
    read_streams,
    readers_of,
    teacher_views,
    texts_of,
    with_held_out,
)
from cmapkd.run.cached import answer_from_cache, student_from_cache
from cmapkd.run.config import RunConfig
from cmapkd.run.contents import check_alike, check_contents, contents_of
from cmapkd.run.folder import save_student
from cmapkd.run.measure import Measured, num_measured, validated, validator_of
from cmapkd.run.mixing import mix_on_validation
from cmapkd.run.remarks import (
    remarks_on_data,
    remarks_on_length,
    remarks_on_method,
    remarks_on_questions,
    remarks_on_student,
    remarks_on_teachers,
)
from cmapkd.run.targets import prepare_targets
from cmapkd.run.texts import classes_of
from cmapkd.training import Trainer, TrainResult
from cmapkd.training.checkpoint import Contents, list_checkpoints, read_checkpoint, read_progress
from cmapkd.training.progress import Outlook


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training leaves beside its files."""

    student: Model
    result: TrainResult
    extra_params: int  # the method's own, beside the student's
    remarks: tuple[str, ...]  # what should be known of it


@dataclass(frozen=True, slots=True)
class Voice:
    """Says what a training is doing; in the first process, if there is a console."""

    console: Console | None
    title: str

    def __call__(self, message: str) -> None:
        if self.console is not None and PartialState().is_main_process:
            self.console.print(f"{self.title}: {message}", markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A training that is ready to begin, go on, or be taken out of a checkpoint."""

    trainer: Trainer
    method: Method
    extra_params: int
    remarks: tuple[str, ...]


def train(
    config: RunConfig,
    measured: Measured,
    *,
    out: Path,
    resume: bool,
    console: Console | None,
    title: str,
    more_trainings: int = 0,
    begin: Callable[[Trainer], None] = lambda _: None,
) -> Trained:
    """Builds the parts, trains, and saves `student/`.

    Args:
        measured: the sources of validation and test.
        more_trainings: that the command makes after this one, for its estimate of the time left.
        begin: is given the trainer when nothing else stands in the way of the first step.
    Raises:
        ConfigError: a resume with other contents than the checkpoints were trained with.
    """
    prepared = _prepare(
        config, measured, out=out, resume=resume, voice=Voice(console, title), more_trainings=more_trainings
    )
    trainer = prepared.trainer
    begin(trainer)
    trained = trainer.run(resume=resume)
    has_student = trainer.accelerator.is_main_process or config.training.sharding == "none"
    if has_student and config.training.student == "best":
        tensors, _ = read_checkpoint(list_checkpoints(trainer.checkpoint_folder, "best")[-1])
        trained.student.load_state_dict(tensors["student"])
    return _left(config, prepared, trained, out, Voice(console, title))


def restore(config: RunConfig, measured: Measured, checkpoint: Path, *, out: Path, console: Console | None) -> Trained:
    """Takes the student out of a checkpoint of `out`, and saves `student/`.

    Raises:
        ConfigError: data or models are not those that it was trained with.
        ValueError: the checkpoint is damaged.
    """
    voice = Voice(console, "student")
    prepared = _prepare(config, measured, out=out, resume=True, voice=voice, answers=False)
    return _left(config, prepared, prepared.trainer.restore(checkpoint), out, voice)


def _left(config: RunConfig, prepared: Prepared, trained: TrainResult, out: Path, voice: Voice) -> Trained:
    student = trained.student
    note_trained(student)
    has_student = prepared.trainer.accelerator.is_main_process or config.training.sharding == "none"
    chosen = mix_on_validation(config, prepared.method, student, say=voice) if has_student else ()
    remarks = (*prepared.remarks, *_said(voice, chosen))
    if prepared.trainer.accelerator.is_main_process:
        save_student(student, out / "student")
        if isinstance(prepared.method.auxiliary, JointHeads):
            with writing(out):
                prepared.method.auxiliary.save(out / "heads")
    return Trained(student, trained, prepared.extra_params, remarks)


def _prepare(
    config: RunConfig,
    measured: Measured,
    *,
    out: Path,
    resume: bool,
    voice: Voice,
    more_trainings: int = 0,
    answers: bool = True,
) -> Prepared:
    """Builds the parts of a training.

    Args:
        answers: whether cached teachers answer from disk, for which the cache is built; not needed without steps.
    """
    check_name(config.student.name)  # before a teacher is loaded, which may take minutes
    source = open_training(config)
    if not resume:  # which refuses other data first, since these may be too few
        check_length(len(source), config.training.batch_size)
    remarks = _said(voice, remarks_on_data(config, source, measured)) if voice.title == "student" else []
    teachers = _loaded_teachers(config, voice)
    if voice.title == "student":
        remarks += _said(voice, [*remarks_on_questions(config, source), *remarks_on_teachers(teachers)])
    torch.manual_seed(config.seed)
    voice(f"building {config.student.name}")
    student = build_student(config, source, teachers)
    voice(f"{config.student.name} has {_sizes(student)}")
    remarks += _said(voice, remarks_on_student(config, student)) if voice.title == "student" else []
    if config.baseline == "scratch":
        _check_parts_of_baseline(config, student)
    for model in (student, *(teacher.model for teacher in teachers.values())):
        if isinstance(model, DualEncoder) and (assumed := assumption(model)) is not None:
            voice(assumed)
    classes = classes_of(config, source)
    if classes is not None and "teacher" in teachers:
        teachers["teacher"].to(PartialState().device)  # a method embeds the classes with it when it is built
    contents = contents_of(
        config, source=source, measured=measured.named(config), student=student, teachers=teachers, classes=classes
    )
    check_alike(contents)
    if resume:
        _check_stored(contents, out, voice)
    torch.manual_seed(config.seed)
    random.seed(config.seed)  # nothing of ours draws from it, but a library may, and checkpoints hold its state
    method = method_of(config, student, teachers, partial(heads_of, config, source), classes)
    remarks += _said(voice, remarks_on_method(config, method)) if voice.title == "student" else []
    texts = texts_of(config, method, source)
    check_training(config, method, source)
    stored = _stored_answers(config, method, source, voice) if answers else {}
    if answers:
        prepare_targets(config, method, source, stored, texts, out=out, resume=resume, voice=voice)
    teachers.clear()  # a cached one has no weights, and this would keep them
    outlook = Outlook(
        num_measured(validated(config, measured.val), measured.val),
        more_trainings,
        num_measured(config, measured.final),
    )
    trainer = Trainer(
        method,
        _batches(config, source, method, stored, texts),
        config.training,
        config.optim,
        out=out,
        seed=config.seed,
        workers=config.data.workers,
        max_bad_share=config.data.max_bad_share,
        timeout=config.data.timeout,
        prefetch_mib=config.data.prefetch_mib,
        validate=validator_of(config, measured.val),
        settings=config.plain(),
        contents=contents,
        outlook=outlook,
        console=voice.console,
        title=voice.title,
    )
    if voice.title == "student":
        remarks += _said(voice, remarks_on_length(config, trainer.total))
    extra = sum(parameter.numel() for parameter in method.parameters()) - student.num_parameters()
    extra -= sum(t.model.num_parameters() for t in method.teachers.values() if isinstance(t, MomentumTeacher))
    return Prepared(trainer, method, extra, tuple(remarks))


def _batches(
    config: RunConfig,
    source: Source,
    method: Method,
    stored: dict[str, Answers],
    texts: Choice,
) -> Batches:
    assert config.data.views is not None
    builder = BatchBuilder(
        source,
        config.data.views,
        readers_of(method, config),
        seed=config.seed,
        on_bad_sample=config.data.on_bad_sample,
        stored=stored,
        extras=method.extras,
        texts=texts,
        memory=config.data.memory,
        more_views=method.more_views,
        view_specs=config.data.more_views,
        own_views=teacher_views(config, method),
        streams=read_streams(config, source),
    )
    place = PartialState()
    return with_held_out(config, method, builder, rank=place.process_index, world_size=place.num_processes)


def _loaded_teachers(config: RunConfig, voice: Voice) -> dict[str, FrozenTeacher]:
    """The run's teachers by role, the first one first; each is told of, because it may take long."""
    teachers = {}
    for role, model in config.teachers.items():
        name = role if role == "teacher" else f"teacher {role}"
        voice(f"loading the {name} {model.name}")
        teachers[role] = FrozenTeacher(build_teacher(model, role), role)
        voice(f"the {name} has {_sizes(teachers[role].model)}")
    return teachers


def _stored_answers(config: RunConfig, method: Method, source: Source, voice: Voice) -> dict[str, Answers]:
    """What of the run answers from disk; teachers that stay live hold their weights as they compute with them."""
    stored: dict[str, Answers] = {}
    if config.cache:
        stored |= answer_from_cache(config, method, source, voice.console)
        stored |= student_from_cache(config, method, source, voice.console)
    if config.training.precision == "bf16":
        _hold_in_bf16(method, voice)
    return stored


def _hold_in_bf16(method: Method, voice: Voice) -> None:
    """A method's live teachers hold weights as they compute with them; where they compute, and once all are hashed."""
    for role, teacher in method.teachers.items():
        if isinstance(teacher, FrozenTeacher) and not teacher.from_disk:
            teacher.to(PartialState().device).hold_in_bf16()
            sizes = {name: each.numel() for name, each in teacher.model.named_parameters()}
            if held := sum(sizes[name] for name in teacher.model.held):
                share = 100 * held / sum(sizes.values())
                voice(f"the {role} holds {share:.0f} % of its parameters in bf16, with the same answers")


def _sizes(model: Model) -> str:
    """How many parameters, and how many of them each of its main parts has."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    towers = {part: sum(sizes[name] for name in names if name in sizes) for part, names in model.parts.items()}
    told = {"image": "image tower", "text": "text tower", "vision": "vision tower", "projector": "projector"}
    told |= {"embeddings": "embeddings", "language": "language model", "head": "head"}
    shown = ", ".join(f"{towers[part]:,} in its {name}" for part, name in told.items() if towers.get(part))
    if isinstance(model, DualEncoder):
        words = sum(table.weight.numel() for table in word_tables(model, model.tokenizer.vocab_size))
        shown += f", of which {words:,} are its table of words" if words and towers.get("text") else ""
    if converted := sum(count for part, count in towers.items() if part.startswith("mixer")):
        shown += f", {converted:,} in converted attention"
    if towers.get("adapters"):
        shown += f"; and {towers['adapters']:,} in adapters beside them"
    return f"{model.num_parameters():,} parameters ({shown})"


def _said(voice: Voice, remarks: Iterable[str]) -> list[str]:
    said = list(remarks)
    for remark in said:
        voice(f"warning: {remark}")
    return said


def _check_stored(contents: Contents, out: Path, voice: Voice) -> None:
    """Compares with what the checkpoints were trained with, if there are any that tell.

    Raises:
        ConfigError: something differs.
    """
    progress = read_progress(out / "checkpoints")
    if progress is None:
        return
    if progress.contents:
        check_contents(progress.contents, contents, where=out)
    else:
        voice(
            "the checkpoints are of a version of cmapkd that kept no fingerprints: whether data and teacher are those "
            "that they were trained with is not checked"
        )


def _check_parts_of_baseline(config: RunConfig, student: Model) -> None:
    """Refuses parts that only the run's method knows, before the student is trained and not after.

    Raises:
        ConfigError: the baseline could not train the same parts.
    """
    unknown = [part for part in config.training.train_parts or () if part not in student.parts]
    if unknown:
        raise ConfigError(
            f"baseline scratch trains the same parts of the student, but {', '.join(unknown)} of training.train_parts "
            f"belongs to method {config.method.name} alone: name parts of {', '.join(student.parts)}, or set "
            "baseline=none"
        )

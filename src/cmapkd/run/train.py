"""One training of a run, from its sources to the saved student."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console

from cmapkd.config import ConfigError, writing
from cmapkd.data.batches import BatchBuilder
from cmapkd.evaluation.probes.joint import JointHeads
from cmapkd.models import DualEncoder, MomentumTeacher
from cmapkd.models.activation import assumption
from cmapkd.run.build import (
    build_student,
    check_training,
    classes_of,
    heads_of,
    load_teachers,
    method_of,
    open_training,
    readers,
    texts_of,
    with_held_out,
)
from cmapkd.run.cached import answer_from_cache, student_from_cache
from cmapkd.run.config import RunConfig
from cmapkd.run.folder import save_student
from cmapkd.run.measure import validator_of
from cmapkd.training import Trainer, TrainResult
from cmapkd.training.checkpoint import checkpoint_path, read_checkpoint


def train(
    config: RunConfig, *, out: Path, resume: bool, console: Console | None, title: str
) -> tuple[DualEncoder, TrainResult, int]:
    """Builds the parts, trains, and saves `student/`. Returns the method's own parameters' number last."""
    source = open_training(config)
    teachers = load_teachers(config)
    torch.manual_seed(config.seed)
    student = build_student(config, source, teachers)
    if config.baseline == "scratch":
        _check_parts_of_baseline(config, student)
    if console is not None and PartialState().is_main_process:
        for model in (student, *(teacher.model for teacher in teachers.values())):
            if (assumed := assumption(model)) is not None:
                console.print(f"{title}: {assumed}", markup=False, highlight=False, soft_wrap=True)
    classes = classes_of(config, source)
    if classes is not None and "teacher" in teachers:
        teachers["teacher"].to(PartialState().device)  # a method embeds the classes with it when it is built
    torch.manual_seed(config.seed)
    random.seed(config.seed)  # nothing of ours draws from it, but a library may, and checkpoints hold its state
    method = method_of(config, student, teachers, partial(heads_of, config, source), classes)
    texts = texts_of(config, method, source)
    assert config.data.views is not None
    check_training(config, method, source)
    stored = answer_from_cache(config, method, source, console) if config.cache else {}
    if config.cache:
        stored |= student_from_cache(config, method, source, console)
    teachers.clear()  # a cached one has no weights, and this would keep them
    builder = BatchBuilder(
        source,
        config.data.views,
        readers(student, *method.teachers.values()),
        seed=config.seed,
        on_bad_sample=config.data.on_bad_sample,
        stored=stored,
        extras=method.extras,
        texts=texts,
        memory=config.data.memory,
        more_views=method.more_views,
        view_specs=config.data.more_views,
    )
    place = PartialState()
    trainer = Trainer(
        method,
        with_held_out(config, method, builder, rank=place.process_index, world_size=place.num_processes),
        config.training,
        config.optim,
        out=out,
        seed=config.seed,
        workers=config.data.workers,
        max_bad_share=config.data.max_bad_share,
        timeout=config.data.timeout,
        validate=validator_of(config),
        settings=config.plain(),
        console=console,
        title=title,
    )
    extra = sum(parameter.numel() for parameter in method.parameters()) - student.num_parameters()
    extra -= sum(t.model.num_parameters() for t in method.teachers.values() if isinstance(t, MomentumTeacher))
    trained = trainer.run(resume=resume)
    assert isinstance(trained.student, DualEncoder)
    student = trained.student
    if trainer.accelerator.is_main_process:
        if config.training.student == "best":
            assert trained.best_step is not None
            tensors, _ = read_checkpoint(checkpoint_path(trainer.checkpoint_folder, trained.best_step, "best"))
            student.load_state_dict(tensors["student"])
        save_student(student, out / "student")
        if isinstance(method.auxiliary, JointHeads):
            with writing(out):
                method.auxiliary.save(out / "heads")
    return student, trained, extra


def _check_parts_of_baseline(config: RunConfig, student: DualEncoder) -> None:
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

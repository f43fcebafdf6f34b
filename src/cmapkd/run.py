"""One run, from config to evidence: the only place that joins data, models, method, training and evaluation."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
import yaml
from accelerate import PartialState
from pydantic import Field, SerializeAsAny, field_validator, model_validator
from rich.console import Console

from cmapkd.cache import DEFAULT_VIEWS, CacheConfig, CachePlan, CacheReader, all_keys, keys_of_run
from cmapkd.cache.progress import BuildDisplay
from cmapkd.config import Config, ConfigError, closest, printable, refuse_secrets, writing
from cmapkd.config.disk import flush, write_text
from cmapkd.data.batches import BatchBuilder, Reader
from cmapkd.data.config import DEFAULT_TIMEOUT, DataConfig
from cmapkd.data.open import open_source
from cmapkd.data.templates import ClassPrompts, get_class_names, get_templates
from cmapkd.data.texts import TextChoice
from cmapkd.data.types import BadSampleError, Source
from cmapkd.evaluation.probes.config import HeadsConfig
from cmapkd.evaluation.probes.joint import JointHeads, build_heads
from cmapkd.evaluation.run import EvaluationConfig, evaluate
from cmapkd.evaluation.suite import count_parameters
from cmapkd.methods import METHODS, Method, MethodConfig, TermsBeside, build_method, check_teachers
from cmapkd.models import DualEncoder, FrozenTeacher, ModelConfig, build_model, load_model
from cmapkd.provenance import describe_environment
from cmapkd.results import RunResult, Scores, gap_closed
from cmapkd.training import OptimConfig, TrainConfig, Trainer, TrainResult
from cmapkd.training.checkpoint import checkpoint_path, read_checkpoint
from cmapkd.training.processes import start_processes, wait_for_all, was_restarted

_FIRST_FILES = ("config.yaml", "environment.json", ".config.yaml.writing", ".environment.json.writing")
_MAY_CHANGE = (  # at a resume: who does the work, not what is computed
    "data.workers",
    "data.memory",
    "data.timeout",
    "evaluation.timeout",
    "training.micro_batch",
    "training.local_loss",
    "training.sharding",
    "training.shard_teacher",
)
VOCABULARY_CAPTIONS = 20_000  # samples read to learn the vocabulary of an untrained tiny model


class RunConfig(Config):
    """Everything a run depends on. The run folder holds it resolved, so that it can be repeated."""

    teacher: ModelConfig | None = Field(None, description="The model that teaches; none for method contrastive.")
    more_teachers: dict[str, ModelConfig] = Field(
        default_factory=dict, description="Further teachers by names of their own, for methods that take several."
    )
    student: ModelConfig = Field(description="The model that learns.")
    data: DataConfig = Field(description="What it learns from and is measured on.")
    method: SerializeAsAny[MethodConfig] = Field(description="How it learns: a name, or a name with its settings.")
    heads: HeadsConfig | None = Field(
        None, description="Small heads that learn with the student: vqa, captioning, detection, each with its weight."
    )
    training: TrainConfig = Field(description="How long and in what precision.")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="Optimiser and learning rate.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="What is measured at the end.")
    baseline: Literal["none", "scratch"] | Path = Field(
        "none", description="Compared with: none; scratch, the same student trained here without teacher; a run folder."
    )
    seed: int = Field(0, ge=0, description="Of initialisation, data order and replacements.")
    cache: CacheConfig | None = Field(
        None, description="off, auto or require: the teacher answers from disk; or with settings."
    )

    @field_validator("more_teachers", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("more_teachers")
    @classmethod
    def _names_of_their_own(cls, value: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        for name in value:
            if name in ("student", "teacher") or not name.isidentifier():
                raise ValueError(
                    f"{name!r} cannot name a further teacher: use a word of letters, digits and underscores that is "
                    "not student or teacher"
                )
        return value

    @field_validator("cache", mode="before")
    @classmethod
    def _cache_may_be_off(cls, value: Any) -> Any:
        mode = value.get("mode", value.get("name")) if isinstance(value, dict) else value
        return None if mode in ("off", False) else value  # YAML reads `off` as false

    @model_validator(mode="after")
    def _views_cycle_with_a_cache(self) -> Self:
        """A new view in every epoch would be stored and read once: with a cache they cycle, unless the recipe says."""
        views = self.data.views
        if self.cache is not None and views is not None and views.num_views is None:
            cycled = views.model_copy(update={"num_views": DEFAULT_VIEWS})
            object.__setattr__(self, "data", self.data.model_copy(update={"views": cycled}))
        return self

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        values = {"name": value} if isinstance(value, str) else value
        if not isinstance(values, dict):
            return value
        name = str(values.get("name"))
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}{closest(name, METHODS)}; known: {', '.join(METHODS)}")
        return METHODS[name].Config.from_mapping(values, where=f"method {name}")

    @model_validator(mode="after")
    def _teacher_fits_method(self) -> Self:
        uses_teacher = METHODS[self.method.name].uses_teacher
        if uses_teacher and self.teacher is None:
            raise ValueError(f"method {self.method.name} distils from a teacher: add teacher: MODEL")
        if uses_teacher:
            check_teachers(self.method.name, self.more_teachers)
        if not uses_teacher and self.baseline == "scratch":
            raise ValueError(
                f"method {self.method.name} has no teacher: it is the scratch baseline itself, drop baseline"
            )
        return self

    @model_validator(mode="after")
    def _weights_to_inherit(self) -> Self:
        for role, model in self.teachers.items():
            if model.inherit is not None:
                raise ValueError(f"teacher {role} would inherit weights: only the student does")
        inherit = self.student.inherit
        if inherit is not None and inherit.name == "teacher" and self.teacher is None:
            raise ValueError(
                f"student.inherit is teacher, and method {self.method.name} has none here: add teacher: MODEL, or name "
                "the model to inherit from"
            )
        return self

    @model_validator(mode="after")
    def _validation_has_data(self) -> Self:
        if self.training.evaluate_every is not None and self.data.val is None:
            raise ValueError("training.evaluate_every is set, but there is nothing to validate on: add data.val")
        tasks = self.evaluation.tasks
        if self.training.evaluate_every is not None and tasks != "auto" and not {"retrieval", "zero_shot"} & {*tasks}:
            raise ValueError(
                "training.evaluate_every is set, and the best step is chosen by retrieval or zero_shot, but "
                f"evaluation.tasks is {', '.join(tasks)}: add one of the two"
            )
        return self

    def scratch(self) -> RunConfig:
        """The baseline of this run: same student, data, steps and seed; nothing of a teacher, and so no stages."""
        contrastive = METHODS["contrastive"].Config(name="contrastive")
        training = self.training.without_stages()
        alone = {"method": contrastive, "training": training, "baseline": "none", "cache": None}
        student = self.student.model_copy(update={"inherit": None})
        return self.without_teachers().model_copy(update={**alone, "student": student})

    def without_teachers(self) -> RunConfig:
        """The same for a method that uses none."""
        return self.model_copy(update={"teacher": None, "more_teachers": {}})

    @property
    def teachers(self) -> dict[str, ModelConfig]:
        """All teachers by role: `teacher`, then the further ones by name."""
        return {} if self.teacher is None else {"teacher": self.teacher, **self.more_teachers}

    def plain(self) -> dict[str, Any]:
        """As plain data, every default written out."""
        values = self.model_dump(mode="json")
        if self.cache is None:  # a run without cache is the run that it was before there were caches
            del values["cache"]
        if self.heads is None:  # and likewise for heads, further teachers and synthetic captions
            del values["heads"]
        if not self.more_teachers:
            del values["more_teachers"]
        if not self.data.mix_synthetic:
            del values["data"]["mix_synthetic"]
        if self.data.timeout == DEFAULT_TIMEOUT:
            del values["data"]["timeout"]
        if self.evaluation.timeout == DEFAULT_TIMEOUT:
            del values["evaluation"]["timeout"]
        for name in ("local_loss", "sharding", "shard_teacher"):  # and for how the processes share the work
            if values["training"][name] == TrainConfig.model_fields[name].default:
                del values["training"][name]
        return values


def run(
    config: RunConfig,
    *,
    out: Path,
    resume: bool = False,
    console: Console | None = None,
    teacher_scores: Scores | None = None,
) -> RunResult:
    """Trains the student, measures it beside its teacher and baseline, and leaves everything in `out`.

    Args:
        out: run folder, new or empty; with `resume`, one that an interrupted run of the same config left. Processes
            that torchrun started again resume by themselves.
        console: where progress is shown; none for silence.
        teacher_scores: this teacher's on the same final data, if they are known from another run; measured if none.
    Returns:
        What `metrics.json` holds. In processes other than the first, an empty result.
    Raises:
        ConfigError: a name in the config is unknown, or `out` holds another run.
        Interrupted, NonFiniteLossError, ValueError: see `Trainer.run`.
    """
    if isinstance(config.baseline, Path) and not config.baseline.is_dir():
        known = ("none", "scratch")
        raise ConfigError(
            f"baseline {str(config.baseline)!r}{closest(str(config.baseline), known)} is neither "
            f"{' nor '.join(known)}, and there is no such run folder"
        )
    if config.baseline == "scratch" and not config.method.reads_captions:
        try:
            open_training(config.scratch())
        except ConfigError as error:
            raise ConfigError(f"baseline scratch, which learns from captions: {error} Or set baseline=none.") from None
    final = _open_final(config)  # first, so that a wrong name shows before the training and not after it
    state = start_processes(on_cpu=config.training.on_cpu)
    with state.main_process_first():
        resume = resume or (was_restarted() and (out / "config.yaml").exists())
        _prepare_folder(out, config, resume=resume, write=state.is_main_process)
    student, trained, extra = _train(config, out=out, resume=resume, console=console, title="student")
    baseline_folder: Path | None = None
    if config.baseline == "scratch":
        baseline_folder = out / "baseline"
        baseline_config = config.scratch()
        if state.is_main_process:
            with writing(out):
                baseline_folder.mkdir(exist_ok=True)
            _write_yaml(baseline_folder / "config.yaml", baseline_config.plain())
        _train(baseline_config, out=baseline_folder, resume=resume, console=console, title="scratch")
    elif isinstance(config.baseline, Path):
        baseline_folder = config.baseline
    if not state.is_main_process:
        wait_for_all()
        return RunResult(out, {})
    scores = _measure(config, final, student, baseline_folder, teacher_scores, device=state.device)
    metrics = scores | _account(config, trained, extra, final)
    _write_json(out / "metrics.json", metrics)
    wait_for_all()
    if console is not None and trained.ledger.num_bad:
        console.print(printable(trained.ledger.summary()), markup=False, highlight=False)
    return RunResult(out, metrics)


def _train(
    config: RunConfig, *, out: Path, resume: bool, console: Console | None, title: str
) -> tuple[DualEncoder, TrainResult, int]:
    """Builds the parts, trains, and saves `student/`. Returns the method's own parameters' number last."""
    source = open_training(config)
    teachers = load_teachers(config)
    torch.manual_seed(config.seed)
    student = build_student(config, source, teachers)
    classes = classes_of(config, source)
    if classes is not None and "teacher" in teachers:
        teachers["teacher"].to(PartialState().device)  # a method embeds the classes with it when it is built
    torch.manual_seed(config.seed)
    random.seed(config.seed)  # nothing of ours draws from it, but a library may, and checkpoints hold its state
    method = method_of(config, student, teachers, partial(heads_of, config, source), classes)
    texts = texts_of(config, method, source)
    assert config.data.views is not None
    stored = answer_from_cache(config, method, source, console) if config.cache else {}
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
    )
    trainer = Trainer(
        method,
        builder,
        config.training,
        config.optim,
        out=out,
        seed=config.seed,
        workers=config.data.workers,
        max_bad_share=config.data.max_bad_share,
        timeout=config.data.timeout,
        validate=_validator(config),
        settings=config.plain(),
        console=console,
        title=title,
    )
    extra = sum(parameter.numel() for parameter in method.parameters()) - student.num_parameters()
    trained = trainer.run(resume=resume)
    student = trained.student
    if trainer.accelerator.is_main_process:
        if config.training.student == "best":
            assert trained.best_step is not None
            tensors, _ = read_checkpoint(checkpoint_path(trainer.checkpoint_folder, trained.best_step, "best"))
            student.load_state_dict(tensors["student"])
        _save_student(student, out / "student")
        if isinstance(method.beside, JointHeads):
            with writing(out):
                method.beside.save(out / "heads")
    return student, trained, extra


def open_training(config: RunConfig) -> Source:
    """What the run learns from: samples with captions, or all where the method reads none."""
    return open_source(config.data.train, split="train", require_captions=config.method.reads_captions)


def load_teachers(config: RunConfig) -> dict[str, FrozenTeacher]:
    """The run's teachers by role, the first one first; none where it has none."""
    return {role: FrozenTeacher(build_model(model), role) for role, model in config.teachers.items()}


def build_student(config: RunConfig, source: Source, teachers: Mapping[str, FrozenTeacher]) -> DualEncoder:
    """The student before its first step."""
    teacher = teachers["teacher"].model if "teacher" in teachers else None
    captions = vocabulary_captions(source)
    if not config.method.reads_captions:
        captions = _or_prompts(captions, config, source)
    return build_model(config.student, captions=captions, teacher=teacher)


def _or_prompts(captions: Iterator[str], config: RunConfig, source: Source) -> Iterator[str]:
    """The captions, or the prompts of the classes where there are none to learn a vocabulary from; lazily."""
    first = next(captions, None)
    if first is not None:
        yield first
        yield from captions
    elif (classes := classes_of(config, source)) is not None:
        yield from classes.texts


def method_of(
    config: RunConfig,
    student: DualEncoder,
    teachers: Mapping[str, FrozenTeacher],
    heads: Callable[[DualEncoder], TermsBeside | None] | None = None,
    classes: ClassPrompts | None = None,
) -> Method:
    """The run's method over these models."""
    first, *more = teachers.values() or (None,)
    further = [each for each in more if each is not None]
    return build_method(
        config.method, student=student, teacher=first, more_teachers=further, beside=heads, classes=classes
    )


def texts_of(config: RunConfig, method: Method, source: Source) -> TextChoice:
    """Which texts of a sample the run reads.

    Raises:
        ConfigError: the training data do not have them.
    """
    choice = _text_choice(config, method)
    choice.check(source)
    return choice


def _text_choice(config: RunConfig, method: Method) -> TextChoice:
    return TextChoice(method.text_pools, config.data.mix_synthetic, required=config.method.reads_captions)


def heads_of(config: RunConfig, source: Source, student: DualEncoder) -> JointHeads | None:
    """The heads that learn with the student; None where the config asks for none."""
    if config.heads is None:
        return None
    template = get_templates(config.evaluation.templates, source)[0]
    return build_heads(config.heads, student=student, source=source, template=template, seed=config.seed)


def classes_of(config: RunConfig, source: Source) -> ClassPrompts | None:
    """The classes of the training source, in the evaluation's words; None where the method does not read them.

    Raises:
        ConfigError: it reads them, and nobody names them.
    """
    if not config.method.reads_classes:
        return None
    names = get_class_names(config.evaluation.class_names, source)
    if not names:
        raise ConfigError(
            f"method {config.method.name}, as it is set, reads the names of the classes, and {source.name} names none: "
            "give evaluation.class_names a file with a name on each line, or take a data.train with labels"
        )
    return ClassPrompts(names, get_templates(config.evaluation.templates, source))


def plan_cache(
    config: RunConfig, method: Method, source: Source, *, whole: bool = False, role: str = "teacher"
) -> CachePlan:
    """What the run asks of a teacher's cache: the rows that it reads, or with `whole` every sample in each view."""
    assert config.data.views is not None
    length, views, batch_size = len(source), config.data.views, config.training.batch_size
    if whole:
        keys = all_keys(length, views.num_views or DEFAULT_VIEWS)
    else:
        steps = config.training.num_steps(max(1, length // batch_size))
        keys = keys_of_run(length, batch_size=batch_size, seed=config.seed, steps=steps, views=views)
    return CachePlan.of_method(
        config.cache or CacheConfig(),
        method,
        source=source,
        views=views,
        keys=keys,
        precision=config.training.precision,
        role=role,
        texts=_text_choice(config, method),
    )


def answer_from_cache(
    config: RunConfig, method: Method, source: Source, console: Console | None
) -> dict[str, CacheReader]:
    """Builds what is missing, if the config lets it, and puts cached teachers into the method; each one's cache."""
    return {role: _answer_from_cache(role, config, method, source, console) for role in [*method.teachers]}


def _answer_from_cache(
    role: str, config: RunConfig, method: Method, source: Source, console: Console | None
) -> CacheReader:
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
    return reader


def readers(student: DualEncoder, *teachers: FrozenTeacher | None) -> dict[str, Reader]:
    """How each model of a run reads a batch."""
    models = {"student": student} | {each.role: each.model for each in teachers if each is not None}
    return {role: Reader(model.image_spec, model.tokenizer) for role, model in models.items()}


def vocabulary_captions(source: Source) -> Iterator[str]:
    """Captions of up to `VOCABULARY_CAPTIONS` samples spread evenly over the source; lazily, few models read them."""
    stride = max(1, len(source) // VOCABULARY_CAPTIONS)
    for index in range(0, min(len(source), stride * VOCABULARY_CAPTIONS), stride):
        try:
            captions = source.captions(index)
        except BadSampleError:  # the training meets it again, and counts it or stops
            continue
        yield from captions


def _validator(config: RunConfig) -> Any:
    """Measures a student on the validation source; None where there is none."""
    if config.data.val is None or config.training.evaluate_every is None:
        return None
    source = open_source(config.data.val, split="val")

    def validate(student: DualEncoder) -> dict[str, float]:
        device = next(student.parameters()).device
        scores = evaluate(student, source, config.evaluation, device=device, on_bad_sample=config.data.on_bad_sample)
        numbers: dict[str, float] = {}
        if scores.get("retrieval"):
            numbers["mean_r@1"] = scores["retrieval"]["mean_r@1"]
        if scores.get("zero_shot"):
            numbers["zero_shot"] = scores["zero_shot"]["top1"]
        return numbers | {"score": next(iter(numbers.values()))}

    return validate


def _open_final(config: RunConfig) -> Source | None:
    """The source of the final numbers; None where none is named."""
    if config.data.final is None:
        return None
    return open_source(config.data.final, split="test" if config.data.test else "val")


def _measure(
    config: RunConfig,
    source: Source | None,
    student: DualEncoder,
    baseline: Path | None,
    teacher_scores: Scores | None,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Scores on the final source of student, baseline and the first teacher, to which the gap is taken."""

    def scores(model: DualEncoder | None) -> Scores | None:
        if model is None:
            return None
        if source is None:
            return count_parameters(model)
        on_bad_sample = config.data.on_bad_sample
        return evaluate(model.to(device), source, config.evaluation, device=device, on_bad_sample=on_bad_sample)

    teacher = teacher_scores
    if teacher is None and config.teacher is not None:
        teacher = scores(build_model(config.teacher))
    student_scores = scores(student)
    baseline_scores = scores(load_model(baseline)) if baseline is not None else None
    return {
        "teacher": teacher,
        "student": student_scores,
        "baseline": baseline_scores,
        "baseline_name": None if baseline is None else "scratch" if config.baseline == "scratch" else baseline.name,
        "gap_closed": gap_closed(teacher, student_scores, baseline_scores),
    }


def _account(config: RunConfig, trained: TrainResult, extra_params: int, source: Source | None) -> dict[str, Any]:
    """How the run went and what it took."""
    return {
        "method": config.method.name,
        "evaluated_on": source.name if source is not None else None,
        "seed": config.seed,
        "steps": trained.steps,
        "batch_size": config.training.batch_size,
        "train_seconds": round(trained.seconds, 1),
        "extra_params": extra_params,  # trained beside the student's
        "peak_memory_bytes": trained.peak_memory,
        "best_step": trained.best_step,
        "bad_samples": trained.ledger.state_dict(),
    }


def _prepare_folder(out: Path, config: RunConfig, *, resume: bool, write: bool) -> None:
    """Makes the run folder, or checks that the one there belongs to this config."""
    stored = out / "config.yaml"
    if resume and stored.exists():
        try:
            before = yaml.safe_load(stored.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{stored} is damaged ({error}): restore it, or start a new run in another folder"
            ) from None
        changed = [
            f"{key} ({pair})" for key, pair in _differences(before, config.plain()).items() if key not in _MAY_CHANGE
        ]
        if changed:
            raise ConfigError(
                f"{out} was started with other settings: {', '.join(changed)}. Resume with the same recipe and "
                "overrides, or start a new run in another folder."
            )
        if write and not (out / "environment.json").exists():  # killed before it was written
            _write_environment(out, config)
        return
    if resume:
        raise ConfigError(f"there is nothing to resume in {out}: it has no config.yaml")
    if not write:
        return
    refuse_secrets(config.plain(), where="recipe")
    # where a run ended before its training began, over a wrong model name for example, there is nothing to keep
    if out.exists() and (not out.is_dir() or any(entry.name not in _FIRST_FILES for entry in out.iterdir())):
        raise ConfigError(f"{out} is not empty: add --resume to go on with the run in it, or name another folder")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    _write_yaml(stored, config.plain())
    _write_environment(out, config)


def _write_environment(out: Path, config: RunConfig) -> None:
    _write_json(out / "environment.json", {"seed": config.seed, **describe_environment()})


def _differences(before: Any, after: Any, path: str = "") -> dict[str, str]:
    """Dotted keys whose values differ, with both values as text."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, str] = {}
        for key in {**before, **after}:
            found |= _differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if before == after else {path: f"was {before!r}, now {after!r}"}


def _save_student(student: DualEncoder, folder: Path) -> None:
    """Writes the model folder whole: under another name first."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(folder.parent):
        try:
            student.save(temporary)
            for file in temporary.rglob("*"):
                flush(file)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            flush(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _write_yaml(path: Path, values: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")

"""What a run measures: on the way, at its end, and of its own cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate import PartialState

from cmapkd.config import RESUME, ConfigError, counted
from cmapkd.data.open import open_source
from cmapkd.data.texts import LOOKED_AT
from cmapkd.data.types import BadSampleError, Source
from cmapkd.data.unseen import unseen
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.headline import headlines
from cmapkd.evaluation.run import assist, evaluate, with_reference, without_reference
from cmapkd.evaluation.share import ALONE, Share
from cmapkd.evaluation.suite import count_parameters
from cmapkd.evaluation.tasks import TASKS
from cmapkd.evaluation.tasks.zero_shot import ZeroShot, check_prompts
from cmapkd.models import GenerativeModel, Model, build_teacher, load_model
from cmapkd.results import Scores, gap_closed
from cmapkd.run.config import RunConfig
from cmapkd.training import TrainResult
from cmapkd.training.memory import OutOfMemory, first_line, is_out_of_memory
from cmapkd.training.processes import patient_group

RANKS = "ranks.safetensors"
"""In a run folder: the ranks by picture of the student on the final source."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The sources that a run is measured on."""

    val: Source | None  # on the way; None where nothing is validated
    final: Source | None  # at the end; None where no data are named

    @classmethod
    def open(cls, config: RunConfig) -> Self:
        """Raises ConfigError: a source cannot be opened, or its classes cannot be asked for as the config says."""
        data, val, final = config.data, None, None
        if data.final is not None:
            final = _of_role(data.final, "test" if data.test else "val")
        if data.val is not None and config.training.evaluate_every is not None:
            val = _of_role(data.val, "val") if data.test else final
        measured = cls(val, final)
        for key, source in measured.named(config).items():
            check_words(config, key, source)
        return measured

    def named(self, config: RunConfig) -> dict[str, Source]:
        """Those that there are, by their settings."""
        final = "data.test" if config.data.test else "data.val"
        pairs = (("data.val", self.val), (final, self.final))
        return {key: source for key, source in pairs if source is not None}


def _of_role(spec: str, role: str) -> Source:
    """A source that is measured on; what is wrong with it bears the name of its setting."""
    try:
        return open_source(spec, split=role)
    except ConfigError as error:
        raise ConfigError(f"data.{role}: {error}") from None


def check_words(config: RunConfig, key: str, source: Source) -> None:
    """Refuses words for the classes of a source that is measured on, where the evaluation reads any.

    Args:
        key: the setting that names the source.
    Raises:
        ConfigError: templates, names or texts of classes cannot be had.
    """
    settings = config.evaluation
    named = settings.tasks if isinstance(settings.tasks, tuple) else ()
    if config.writes or (named and not any(issubclass(TASKS[name], ZeroShot) for name in named)):
        return
    try:
        check_prompts(settings, source)
    except ValueError as error:
        raise ConfigError(f"{key} cannot be measured by its classes: {error}") from None


def num_measured(config: RunConfig, source: Source | None) -> int:
    """How many samples of a source an evaluation reads."""
    if source is None:
        return 0
    return len(source) if config.evaluation.limit is None else min(len(source), config.evaluation.limit)


def validated(config: RunConfig, source: Source | None) -> RunConfig:
    """The config of a validation on the way: of models that write it asks about fewer samples.

    Where the recipe names no tasks, it measures answers alone, or likelihoods where there is nothing to answer.
    """
    if not config.writes or source is None:
        return config
    settings = config.evaluation
    bounds = [each for each in (settings.limit, settings.writing.validation_samples) if each is not None]
    chosen: dict[str, Any] = {"limit": min(bounds, default=None)}
    if settings.tasks == "auto":
        asks = settings.writing.like(config.data.prompts).asks
        chosen["tasks"] = ("answering",) if _is_asked(source, asks, chosen["limit"]) else ("perplexity",)
    return config.model_copy(update={"evaluation": settings.model_copy(update=chosen)})


def _is_asked(source: Source, asks: str | None, limit: int | None) -> bool:
    """Whether one of the first samples has a question with an answer, or a dialogue, and `asks` leaves it in.

    Args:
        limit: as many samples are asked about.
    """
    if asks == "captions":
        return False
    for index in range(min(LOOKED_AT, len(source), limit or LOOKED_AT)):
        try:
            sample = unseen(source, index)
        except BadSampleError:
            continue
        if asks in ("auto", "turns") and sample.turns:
            return True
        if asks != "turns" and any(question.answers for question in sample.questions):
            return True
    return False


def validator_of(config: RunConfig, source: Source | None) -> Any:
    """Measures a student on the validation source; None where there is none."""
    if source is None:
        return None
    return Validator(validated(config, source), source)


@dataclass(frozen=True, slots=True)
class Validator:
    """Measures a student on the validation source; several processes compute together."""

    config: RunConfig
    source: Source

    def __call__(self, student: Model) -> dict[str, float]:
        """In the first process."""
        scores = scores_of(student, self.source, self.config, device=student.device, share=share_of(self.config))
        numbers: dict[str, float] = {headline.label: number for headline, number in headlines(scores).values()}
        first = next(iter(numbers.values()))
        if "retrieval" in scores:  # recall says nothing without what it is of
            numbers |= {key: scores["retrieval"][key] for key in ("num_images", "num_texts")}
        return numbers | {"score": first}

    def assist(self, student: Model) -> None:
        """In the others, meanwhile."""
        if (share := share_of(self.config)).of > 1:
            scores_of(student, self.source, self.config, device=PartialState().device, share=share)


def share_of(config: RunConfig) -> Share:
    """This process's part of an evaluation; the first does all of models whose student is sharded."""
    group = patient_group()
    if group is None or config.training.sharding != "none":
        return ALONE
    return Share(dist.get_rank(), dist.get_world_size(), group)


def _evaluation_of(config: RunConfig) -> EvaluationConfig:
    """As the recipe says, and as the student learns."""
    settings = config.evaluation
    if config.classifies and settings.tasks == "auto":  # also of the teacher, whose texts are the classes' then
        settings = settings.model_copy(update={"tasks": ("accuracy",)})
    if config.writes:  # asked as in training
        settings = settings.model_copy(update={"writing": settings.writing.like(config.data.prompts)})
    return settings


def scores_of(
    model: Model,
    source: Source,
    config: RunConfig,
    *,
    device: torch.device,
    ranks_file: str | Path | None = None,
    share: Share = ALONE,
    reference: Model | None = None,
) -> Scores:
    """Scores of a model of a run on whatever data, by the run's protocol; none in processes that assist.

    Args:
        ranks_file: where ranks by picture are written; None: nowhere.
        reference: what tasks that compare with a first model compare with; without it they are left out.
    Raises:
        OutOfMemory: says which settings take less, and whether they may change at a resume.
    """
    settings = _evaluation_of(config)
    how: dict[str, Any] = {"device": device, "on_bad_sample": config.data.on_bad_sample, "share": share}
    try:
        if not share.leads:
            assist(model.to(device), source, settings, **how)
            return {}
        left = settings if reference is not None else without_reference(settings)
        if left is None:
            with share:  # so that no other process waits for more
                return count_parameters(model)
        return evaluate(model.to(device), source, left, ranks_file=ranks_file, reference=reference, **how)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"memory ran out while {model.name} was scored on {source.name} ({first_line(error)}). "
            f"{_how_to_go_on(config)}"
        ) from error


def _how_to_go_on(config: RunConfig) -> str:
    """What takes less memory to score. The number of dialogues at once belongs to the protocol of models that write."""
    settings = config.evaluation
    if config.writes:
        size = settings.writing.batch_size
        return (
            f"evaluation.writing.batch_size={max(1, size // 4)} (now {size}) takes less. Scores depend on it, so it "
            "may not change at a resume: take it in a new folder. If the student is trained, its folder is written: "
            f"then score that alone, with cmapkd evaluate RUN_FOLDER --set writing.batch_size={max(1, size // 4)}"
        )
    fewer = f", evaluation.workers=0 (now {settings.workers})" if settings.workers else ""
    return (
        f"To go on, {RESUME} with evaluation.batch_size={max(1, settings.batch_size // 4)} (now {settings.batch_size})"
        f"{fewer}: the scores stay the same, and what was trained is kept"
    )


def measure(
    config: RunConfig,
    source: Source | None,
    student: Model,
    baseline: Path | None,
    teacher_scores: Scores | None,
    *,
    device: torch.device,
    out: Path,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Scores on the final source of student, baseline and the first teacher, to which the gap is taken.

    A teacher that writes, of a student that does not, has no scores, nor has one the other way round: nothing measures
    both. The student's ranks by picture are written into `out`. Every process of `share_of` calls it; the first has
    scores.

    Args:
        say: is told what is being done.
    """
    name, share = baseline_name(config, baseline), share_of(config)
    judged = build_teacher(config.teacher) if teacher_scores is None and config.teacher is not None else None
    if config.writes != isinstance(judged, GenerativeModel):
        judged = None
    todo = [] if judged is None else ["teacher"]
    todo += ["student"] + ([] if name is None else [name])

    def scores(role: str, model: Model, ranks_file: Path | None = None, reference: Model | None = None) -> Scores:
        if source is None:
            return count_parameters(model)
        size = num_measured(config, source)
        say(f"evaluating {todo.index(role) + 1} of {len(todo)}: {role}, on {counted(size, 'sample')} of {source.name}")
        how: dict[str, Any] = {"device": device, "ranks_file": ranks_file, "share": share, "reference": reference}
        return scores_of(model, source, config, **how)

    teacher = teacher_scores
    reference = reference_of(config, judged) if share.leads and source is not None else None
    if judged is not None:
        teacher, judged = scores("teacher", judged), None
    student_scores = scores("student", student, out / RANKS, reference)
    baseline_scores = scores(str(name), load_model(baseline), None, reference) if baseline is not None else None
    if not share.leads:
        return {}
    return {
        "teacher": teacher,
        "student": student_scores,
        "baseline": baseline_scores,
        "baseline_name": name,
        "gap_closed": gap_closed(teacher, student_scores, baseline_scores),
    }


def reference_of(config: RunConfig, built: Model | None = None) -> Model | None:
    """The teacher, where a named task compares with it; else None.

    Args:
        built: the teacher, if somebody has built it.
    """
    if config.teacher is None or with_reference(config.evaluation) is None:
        return None
    return built or build_teacher(config.teacher)


def baseline_name(config: RunConfig, baseline: Path | None) -> str | None:
    if baseline is None:
        return None
    if config.baseline != "scratch":
        return baseline.name
    return config.scratch().method.name if config.writes else "scratch"  # `contrastive` is what scratch always meant


def _by_part(trained: TrainResult) -> dict[str, float]:
    """What was told apart, and the steps themselves."""
    parts = {name: round(seconds, 1) for name, seconds in trained.parts.items()}
    return {**parts, "steps": round(max(0.0, trained.seconds - sum(trained.parts.values())), 1)}


def account(config: RunConfig, trained: TrainResult, extra_params: int, source: Source | None) -> dict[str, Any]:
    """How the run went and what it took."""
    remarks = {"extended": trained.extended} if trained.extended else {}
    return remarks | {
        "method": config.method.name,
        "evaluated_on": source.name if source is not None else None,
        "seed": config.seed,
        "steps": trained.steps,
        "total_steps": trained.total,  # that the run is to have: more where it was stopped
        "batch_size": config.training.batch_size,
        "train_seconds": round(trained.seconds, 1),
        "seconds_by_part": _by_part(trained),
        "extra_params": extra_params,  # trained beside the student's
        "peak_memory_bytes": trained.peak_memory,
        "best_step": trained.best_step,
        "bad_samples": trained.ledger.state_dict(),
    }

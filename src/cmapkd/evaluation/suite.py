"""`evaluate_models`: several models side by side on one source, each embedded once for all tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.types import Source
from cmapkd.evaluation.answer_scores import AnswerScore
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.embed import OnBadSample
from cmapkd.evaluation.picture_ranks import MAX_PICTURES, PictureRanks
from cmapkd.evaluation.share import ALONE, Share
from cmapkd.evaluation.subject import Bench, Subject
from cmapkd.evaluation.tasks import TASKS, Task, check_tasks, make_task
from cmapkd.evaluation.writing import NothingReadError
from cmapkd.models.base import DualEncoder, Model
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.types import BOTH


def evaluate_models(
    models: Mapping[str, Model],
    source: Source | None,
    config: EvaluationConfig | None = None,
    *,
    device: torch.device | str,
    train: Source | None = None,
    work: str | Path | None = None,
    on_bad_sample: OnBadSample = "skip",
    autocast: torch.dtype | None = None,
    console: Console | None = None,
    picture_ranks: dict[str, PictureRanks] | None = None,
    answer_scores: dict[str, dict[str, AnswerScore]] | None = None,
    share: Share = ALONE,
) -> dict[str, dict[str, Any]]:
    """Scores of every model by name, ready for JSON. The first model is the reference: the teacher, where there is one.

    Args:
        source: what is scored; None for tasks that need none (efficiency).
        train: what the probes of vqa, captioning and detection learn from; must not be the scored source.
        work: folder in which probes keep checkpoints, so that a second call goes on or reuses them; None: nowhere.
        device: where the towers run; models are moved there, and keep their training modes.
        on_bad_sample, autocast: see `embed`.
        picture_ranks: is given each model's ranks by picture, where a task ranked and the pictures are not too many.
        answer_scores: the same for models that write: scores by picture, by their paths.
        share: of several processes that compute together; this one is the first.
    Returns:
        For each model the scores of each task by its name; `params`; if a source was read, `bad_samples`, how many
        could not be, and `scored`: numbers of `images`, `captions`, of models that write `questions`, and `skipped`
        samples, of all `samples` of the source, and the `limit` that was set, or None.
    Raises:
        ConfigError: a wrong name among the settings, or probes would learn from what is scored.
        ValueError: a task that was named cannot be measured on this source, or none can; or some models write and
            others embed, so that no task measures all.
    """
    config = config or EvaluationConfig()
    if not models:
        raise ValueError("there is no model to evaluate")
    if source is not None and train is not None and same_samples(source, train):
        raise ConfigError(
            f"probes would learn from {train.name}, which is what is scored: name another split to train on"
        )
    check_tasks(config)
    wanted = _wanted(config, models)
    if not wanted:
        raise ValueError(_mixed(models))
    bench = Bench(
        config,
        torch.device(device),
        source,
        train,
        None if work is None else Path(work),
        on_bad_sample,
        autocast,
        levels=any(task.needs_levels for task in wanted.values()),
        negatives=config.negatives if any(task.needs_negatives for task in wanted.values()) else 0,
        console=console,
        share=share,
    )
    subjects = [Subject(name, model, bench) for name, model in models.items()]
    measured = _measurable(wanted, subjects, bench)
    scores = _measure(measured, subjects, bench)
    for subject in subjects:
        scores[subject.name] |= count_parameters(subject.model)
        if "embedded" in subject.__dict__:
            scores[subject.name]["bad_samples"] = len(subject.embedded.bad)
            scores[subject.name]["scored"] = _scored(subject)
            if picture_ranks is not None and subject.ranks and len(subject.embedded.ids) <= MAX_PICTURES:
                picture_ranks[subject.name] = PictureRanks.of(subject.embedded, subject.ranks)
        elif "writer" in subject.__dict__:
            scores[subject.name]["bad_samples"] = len(subject.writer.bad)
            scores[subject.name]["scored"] = _asked(subject)
            _warn_of_precision(subject)
            if answer_scores is not None and subject.answers and bench.num_scored <= MAX_PICTURES:
                answer_scores[subject.name] = subject.answers
    return scores


def _measure(measured: Mapping[str, Task], subjects: list[Subject], bench: Bench) -> dict[str, dict[str, Any]]:
    """Scores by model and task. A task that nobody named is left out where a model can read none of its dialogues."""
    scores: dict[str, dict[str, Any]] = {subject.name: {} for subject in subjects}
    unread: NothingReadError | None = None
    for name, task in measured.items():
        try:
            results = task.measure(subjects, bench)
        except NothingReadError as error:
            if bench.config.tasks not in ("auto", "all"):
                raise
            bench.say(f"not measured: {name}: {error}")
            unread = error
            continue
        for subject, result in zip(subjects, results, strict=True):
            scores[subject.name][name] = result
    if unread is not None and not any(scores.values()):
        raise unread
    return scores


def _scored(subject: Subject) -> dict[str, int | None]:
    """What the scores are of."""
    embedded, bench = subject.embedded, subject.bench
    return {
        "images": len(embedded.ids),
        "captions": len(embedded.captions),
        "skipped": len(embedded.bad),
        "samples": len(bench.scored),
        "limit": bench.config.limit,
    }


def _asked(subject: Subject) -> dict[str, int | None]:
    """What the scores of a model that writes are of."""
    writer, bench = subject.writer, subject.bench
    more = {"skipped": writer.num_skipped, "samples": len(bench.scored), "limit": bench.config.limit}
    return writer.counts() | more


def _warn_of_precision(subject: Subject) -> None:
    """Half precision makes the batch part of the result: near ties of two tokens fall by rounding."""
    if subject.writer.precision not in ("float32", "float64"):
        subject.bench.say(
            f"warning: {subject.name} wrote in {subject.writer.precision}: its answers depend on writing.batch_size "
            f"({subject.writer.batch_size}). Compare models at the same one, or in float32"
        )


def _mixed(models: Mapping[str, Model]) -> str:
    """Why no task is left: the models keep different contracts, or one embeds no texts."""
    for name, model in models.items():
        if isinstance(model, DualEncoder) and model.towers != BOTH:
            return f"{name} has an image tower alone, which linear_probe and knn can measure: name them as tasks"
    writing = [name for name, model in models.items() if isinstance(model, GenerativeModel)]
    other = [name for name in models if name not in writing]
    return (
        f"no task measures all of these models: {', '.join(writing) or 'none'} write answers, and "
        f"{', '.join(other) or 'none'} embed images. Evaluate the two kinds apart."
    )


def count_parameters(model: Model) -> dict[str, Any]:
    """`params`, the number of parameters; `params_borrowed`, how many of them are another model's.

    Of models that write also `params_by_part`.
    """
    borrowed = model.num_borrowed_parameters()
    counts: dict[str, Any] = {"params": model.num_parameters()}
    if isinstance(model, GenerativeModel):
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        parts = {part: sum(sizes[name] for name in names) for part, names in model.parts.items()}
        counts["params_by_part"] = {part: number for part, number in parts.items() if number}
    return counts | ({"params_borrowed": borrowed} if borrowed else {})


def training_source(train: str | None, data: str | None) -> Source | None:
    """What probes learn from: the source that `train` names, or where `data` is `scenes` its training split.

    Raises:
        ConfigError: `train` names a test split.
    """
    if train is None:
        if data is None or data.partition(":")[0].partition("@")[0].partition("?")[0] != "scenes":
            return None
        kind, _, options = data.partition("?")
        kept = [option for option in options.split("&") if option.startswith("size=")]  # a length is the scored split's
        train = kind.partition("@")[0] + ("?" + kept[0] if kept else "")
    if re.search(r"@test[\w-]*(?=\?|$)", train):
        raise ConfigError(
            f"--train {train!r} is a test split: nothing learns or is chosen there. Name a training split."
        )
    return open_source(train, split="train")


def _wanted(config: EvaluationConfig, models: Mapping[str, Model]) -> dict[str, Task]:
    """`auto` takes cmapkd's own tasks alone, so that an installed package changes no run that does not name it."""
    names: Iterable[str] = config.tasks
    if config.tasks == "all":
        names = [name for name in TASKS if _readable(TASKS[name], models)]
    elif config.tasks == "auto":
        names = [
            name for name, kind in TASKS.own.items() if _readable(kind, models) and kind.is_automatic(models.values())
        ]
    return {name: make_task(name, config) for name in names}


def _readable(kind: type[Task], models: Mapping[str, Model]) -> bool:
    return all(_unread(kind, name, model) is None for name, model in models.items())


def _unread(kind: type[Task], name: str, model: Model) -> str | None:
    """Why a task cannot read a model, whatever the data; None where it can."""
    if not isinstance(model, kind.reads):
        return f"it is for a model that {kind.reads.does}, and {name} {model.does}"
    if kind.needs_texts and isinstance(model, DualEncoder) and model.towers != BOTH:
        return f"it embeds texts, and {name} has an image tower alone"
    return None


def check_comparable(models: Mapping[str, Model], config: EvaluationConfig) -> None:
    """Refuses named tasks that cannot measure these models beside each other, whatever the data.

    Raises:
        ConfigError: names the task, and why.
    """
    bench = Bench(config, torch.device("cpu"))
    subjects = [Subject(name, model, bench) for name, model in models.items()]
    for name, task in _wanted(config, models).items():
        unread = (_unread(type(task), subject.name, subject.model) for subject in subjects)
        if (why := next(filter(None, unread), None) or task.unlike(subjects)) is not None:
            raise ConfigError(f"evaluation.tasks names {name}, which cannot be measured here: {why}")


def _measurable(wanted: Mapping[str, Task], subjects: list[Subject], bench: Bench) -> dict[str, Task]:
    """The tasks that can be measured; refuses those that were named and cannot, before any takes long."""
    refused: dict[str, str] = {}
    for name, task in wanted.items():
        unread = (_unread(type(task), subject.name, subject.model) for subject in subjects)
        if (reason := next(filter(None, unread), None)) is not None:
            refused[name] = reason
        elif task.needs_source and bench.source is None:
            refused[name] = "it needs data: name them with --data"
        elif task.needs_reference and len(subjects) < 2:
            refused[name] = "it compares models with the first: name the teacher and then the student"
        elif task.trains and bench.train is None:
            refused[name] = "its head learns on another split of the data: name it with --train"
        elif task.needs_source:
            task.prepare(subjects[0])
    named = bench.config.tasks not in ("auto", "all")
    if not (refused and named):
        for name, task in wanted.items():
            if name not in refused and (why := task.unlike(subjects) or task.missing(subjects[0])) is not None:
                refused[name] = why
    if refused and (named or len(refused) == len(wanted)):
        where = bench.source.name if bench.source is not None else "this"
        raise ValueError(f"{where} cannot be evaluated for " + "; ".join(f"{n}: {why}" for n, why in refused.items()))
    for name, why in refused.items():
        if bench.config.tasks == "all":
            bench.say(f"not measured: {name}: {why}")
    return {name: task for name, task in wanted.items() if name not in refused}


def same_samples(first: Source, second: Source) -> bool:
    """Either alone is enough: a limit changes the fingerprint of the same samples, another spelling the name."""
    return first is second or first.name == second.name or first.fingerprint() == second.fingerprint()

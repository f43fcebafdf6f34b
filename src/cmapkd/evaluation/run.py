"""`evaluate`: one model on one source, every task from one pass of embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cmapkd.data.types import Source
from cmapkd.evaluation.answer_scores import AnswerScore, save_answer_scores
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.embed import OnBadSample, embed
from cmapkd.evaluation.picture_ranks import PictureRanks
from cmapkd.evaluation.share import ALONE, Share
from cmapkd.evaluation.suite import evaluate_models
from cmapkd.evaluation.tasks import TASKS
from cmapkd.evaluation.writing import Writer
from cmapkd.models.base import ImageEncoder, Model
from cmapkd.models.generative import GenerativeModel

__all__ = ["EvaluationConfig", "assist", "evaluate", "with_reference", "without_reference"]


def evaluate(
    model: Model,
    source: Source,
    config: EvaluationConfig | None = None,
    *,
    device: torch.device | str,
    on_bad_sample: OnBadSample = "skip",
    autocast: torch.dtype | None = None,
    ranks_file: str | Path | None = None,
    share: Share = ALONE,
    reference: Model | None = None,
) -> dict[str, Any]:
    """Scores of `model` on `source`, ready for JSON; see `evaluate_models` for several, and for tasks that need more.

    Args:
        device: where the towers run; the model is moved there, and keeps its training modes.
        on_bad_sample, autocast: see `embed`.
        ranks_file: where ranks or scores by picture are written, see `PictureRanks` and, for models that write,
            `AnswerScore`; none is written if there are none.
        share: of several processes that compute together. This is the first; the others call `assist`.
        reference: what tasks that compare with a first model compare with. This process alone measures these.
    Returns:
        `retrieval` (see `retrieval.retrieval`), `zero_shot` (see `zero_shot.zero_shot`), ..., those that were measured;
        `params`, the model's number of parameters, of which `params_borrowed`, if any, are another model's tower;
        `bad_samples`, how many could not be read.
    Raises:
        ConfigError: templates or class names that do not exist.
        ValueError: a task that was named cannot be measured on this source, or none can.
    """
    config = config or EvaluationConfig()
    ranks: dict[str, PictureRanks] = {}
    answers: dict[str, AnswerScore] = {}
    scores: dict[str, Any] = {}

    def measured(models: dict[str, Model], tasks: EvaluationConfig, share: Share) -> None:
        found: dict[str, dict[str, AnswerScore]] = {}
        scores.update(
            evaluate_models(
                models,
                source,
                tasks,
                device=device,
                on_bad_sample=on_bad_sample,
                autocast=autocast,
                picture_ranks=None if ranks_file is None else ranks,
                answer_scores=None if ranks_file is None else found,
                share=share,
            )["model"]
            | scores
        )
        answers.update(found.get("model", {}))

    with share:
        alone = config if reference is None else without_reference(config)
        if alone is not None:
            measured({"model": model}, alone, share)
        if reference is not None and (beside := with_reference(config)) is not None:
            measured({"teacher": reference, "model": model}, beside, ALONE)
    if ranks_file is not None and ranks:
        ranks["model"].save(ranks_file)
    if ranks_file is not None and answers:
        save_answer_scores(answers, ranks_file)
    return scores


def with_reference(config: EvaluationConfig) -> EvaluationConfig | None:
    """The named tasks that compare a model with a first one; None: there are none."""
    return _some(config, True)


def without_reference(config: EvaluationConfig) -> EvaluationConfig | None:
    """Without the named tasks that compare a model with a first one; None: none is left."""
    return _some(config, False)


def _some(config: EvaluationConfig, compares: bool) -> EvaluationConfig | None:
    if not isinstance(config.tasks, tuple):  # of their own these words mean no such task
        return None if compares else config
    tasks = tuple(name for name in config.tasks if TASKS[name].needs_reference is compares)
    return config.model_copy(update={"tasks": tasks}) if tasks else None


def assist(
    model: Model,
    source: Source,
    config: EvaluationConfig,
    *,
    device: torch.device | str,
    share: Share,
    on_bad_sample: OnBadSample = "skip",
    autocast: torch.dtype | None = None,
) -> None:
    """In every process but the first: computes its part whenever the first process calls, until that has scored.

    Args:
        model: with the same weights as the first process's; the other arguments are those of its `evaluate`.
    """
    if isinstance(model, GenerativeModel):
        writer = Writer(model, source, config, torch.device(device), autocast, on_bad_sample, share)
        while (asked := share.asked()) is not None:
            writer.computed(**asked)
        return
    while (asked := share.asked()) is not None:
        assert isinstance(model, ImageEncoder)  # of others the first process asks nothing
        embed(
            model,
            source,
            batch_size=config.batch_size,
            device=device,
            workers=config.workers,
            timeout=config.timeout,
            limit=config.limit,
            on_bad_sample=on_bad_sample,
            autocast=autocast,
            share=share,
            **asked,
        )

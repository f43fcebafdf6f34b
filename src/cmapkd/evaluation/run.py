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
from cmapkd.evaluation.writing import Writer
from cmapkd.models.base import ImageEncoder, Model
from cmapkd.models.generative import GenerativeModel

__all__ = ["EvaluationConfig", "assist", "evaluate"]


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
) -> dict[str, Any]:
    """Scores of `model` on `source`, ready for JSON; see `evaluate_models` for several, and for tasks that need more.

    Args:
        device: where the towers run; the model is moved there, and keeps its training modes.
        on_bad_sample, autocast: see `embed`.
        ranks_file: where ranks or scores by picture are written, see `PictureRanks` and, for models that write,
            `AnswerScore`; none is written if there are none.
        share: of several processes that compute together. This is the first; the others call `assist`.
    Returns:
        `retrieval` (see `retrieval.retrieval`), `zero_shot` (see `zero_shot.zero_shot`), ..., those that were measured;
        `params`, the model's number of parameters, of which `params_borrowed`, if any, are another model's tower;
        `bad_samples`, how many could not be read.
    Raises:
        ConfigError: templates or class names that do not exist.
        ValueError: a task that was named cannot be measured on this source, or none can.
    """
    ranks: dict[str, PictureRanks] = {}
    answers: dict[str, dict[str, AnswerScore]] = {}
    with share:
        scores = evaluate_models(
            {"model": model},
            source,
            config,
            device=device,
            on_bad_sample=on_bad_sample,
            autocast=autocast,
            picture_ranks=None if ranks_file is None else ranks,
            answer_scores=None if ranks_file is None else answers,
            share=share,
        )
    if ranks_file is not None and ranks:
        ranks["model"].save(ranks_file)
    if ranks_file is not None and answers:
        save_answer_scores(answers["model"], ranks_file)
    return scores["model"]


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

"""`evaluate`: one model on one source, every task from one pass of embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from cmapkd.config import Config, closest
from cmapkd.data.types import Source
from cmapkd.evaluation.embed import Embedded, OnBadSample, embed
from cmapkd.evaluation.retrieval import retrieval, shared_captions
from cmapkd.evaluation.templates import get_class_names, get_templates
from cmapkd.evaluation.zero_shot import classifier, zero_shot
from cmapkd.models.base import DualEncoder

TASKS = ("retrieval", "zero_shot")


class EvaluationConfig(Config):
    """What is measured, and by which protocol (see docs/evaluation.md)."""

    tasks: Literal["auto"] | tuple[Literal["retrieval", "zero_shot"], ...] = Field(
        "auto", description="What is measured; auto: whatever the source has captions or labels for."
    )
    templates: str = Field(
        "auto",
        description="Prompts of zero-shot classes: openai_imagenet, simple, photo, plain, scenes or a text file; "
        "auto: the source's own, else photo.",
    )
    class_names: str | None = Field(
        None, description="Names of the labels: imagenet, or a text or JSON file; none: the source's own."
    )
    batch_size: int = Field(256, ge=1, description="Images, and texts, encoded at once; no influence on the scores.")
    workers: int = Field(0, ge=0, description="Processes that read and decode; 0: the evaluating process itself.")
    limit: int | None = Field(None, ge=1, description="Only the first so many samples; none: all.")
    shared_captions: bool = Field(
        False, description="Whether identical captions of other images count as right; no in the standard protocol."
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _known_tasks(cls, value: Any) -> Any:
        if value == "auto":
            return value
        tasks = [value] if isinstance(value, str) else value
        if not isinstance(tasks, Sequence) or not tasks:
            raise ValueError(f"must be auto, or one or more of {', '.join(TASKS)}; got {value!r}")
        for task in tasks:
            if task not in TASKS:
                raise ValueError(
                    f"unknown task {task!r}{closest(str(task), TASKS)}; known: {', '.join(TASKS)}, or auto"
                )
        return tuple(dict.fromkeys(tasks))


def evaluate(
    model: DualEncoder,
    source: Source,
    config: EvaluationConfig | None = None,
    *,
    device: torch.device | str,
    on_bad_sample: OnBadSample = "skip",
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Scores of `model` on `source`, ready for JSON.

    Args:
        device: where the towers run; the model is moved there, and keeps its training modes.
        on_bad_sample, autocast: see `embed`.
    Returns:
        `retrieval` (see `retrieval.retrieval`) and `zero_shot` (see `zero_shot.zero_shot`), those that were measured;
        `params`, the model's number of parameters; `bad_samples`, how many could not be read.
    Raises:
        ConfigError: templates or class names that do not exist.
        ValueError: a task that was named cannot be measured on this source, or none can.
    """
    config = config or EvaluationConfig()
    wanted = TASKS if config.tasks == "auto" else config.tasks
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] = ()
    if "zero_shot" in wanted:  # before the long part, so that a wrong name costs no time
        class_names, templates = get_class_names(config.class_names, source), get_templates(config.templates, source)
    embedded = embed(
        model,
        source,
        batch_size=config.batch_size,
        device=device,
        workers=config.workers,
        limit=config.limit,
        on_bad_sample=on_bad_sample,
        autocast=autocast,
    )
    missing = _missing(embedded, class_names)
    refused = [f"{task}: {missing[task]}" for task in wanted if task in missing]
    if refused and (config.tasks != "auto" or len(refused) == len(wanted)):
        raise ValueError(f"{source.name} cannot be evaluated for " + "; ".join(refused))

    scores: dict[str, Any] = {}
    if "retrieval" in wanted and "retrieval" not in missing:
        extra = shared_captions(embedded.captions, embedded.image_of_text) if config.shared_captions else None
        scores["retrieval"] = retrieval(embedded.images, embedded.texts, embedded.image_of_text, also_positive=extra)
    if "zero_shot" in wanted and "zero_shot" not in missing:
        assert class_names is not None
        weights = classifier(
            model, class_names, templates, batch_size=config.batch_size, device=device, autocast=autocast
        )
        scores["zero_shot"] = zero_shot(embedded.images, embedded.labels, weights)
    return scores | {"params": model.num_parameters(), "bad_samples": len(embedded.bad)}


def _missing(embedded: Embedded, class_names: tuple[str, ...] | None) -> dict[str, str]:
    """The tasks that the source cannot serve, and why."""
    missing: dict[str, str] = {}
    if not embedded.captions:
        missing["retrieval"] = f"none of its {len(embedded.ids)} images has a caption"
    if not bool((embedded.labels >= 0).any()):
        missing["zero_shot"] = f"none of its {len(embedded.ids)} images has a label"
    elif class_names is None:
        missing["zero_shot"] = "its labels have no names; give class_names, a set or a file"
    return missing

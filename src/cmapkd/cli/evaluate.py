"""`cmapkd evaluate`: score any models on any data, side by side."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Run folders, or names such as open_clip:ViT-B-32/laion2b_s34b_b79k or onnx:exports/a@int8 (files of "
            "cmapkd export); LABEL=MODEL to name one. The "
            "first is the reference (the teacher) that costs and agreement are measured against.",
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="Source that is scored, for example scenes. Not needed for efficiency alone.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a source that has several.")] = "val",
    train: Annotated[
        str | None,
        typer.Option(
            help="Source that the heads of vqa, captioning and detection learn from; scenes: its train split."
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated: retrieval, zero_shot, vqa, captioning, detection, calibration, agreement, "
            "efficiency; auto: the first two; all: whatever the data serve."
        ),
    ] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for the trained heads: a second call goes on, or reuses them.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Settings of the evaluation: key=value, repeatable.")
    ] = None,
) -> None:
    """Score models: retrieval, zero-shot, questions, captions, detection, calibration, agreement, cost."""
    from rich.console import Console

    named, values = _named(models), _settings(tasks, settings or [])

    import torch

    from cmapkd.api import load
    from cmapkd.data.open import open_source
    from cmapkd.evaluation.config import SuiteConfig
    from cmapkd.evaluation.headline import remark_on_retrieval
    from cmapkd.evaluation.suite import evaluate_models, training_source
    from cmapkd.evaluation.table import score_table
    from cmapkd.evaluation.tasks import check_tasks
    from cmapkd.training import Interrupted

    config = SuiteConfig.from_mapping(values, where="evaluation settings")
    check_tasks(config)  # before any model is loaded
    source = open_source(data, split=split) if data is not None else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    loaded = {name: load(model) for name, model in named.items()}
    try:
        scores = evaluate_models(
            loaded,
            source,
            config,
            device=device,
            train=training_source(train, data),
            work=work,
            console=console,
        )
    except Interrupted as stopped:
        where = f"Go on with:\n  {shlex.join(['cmapkd', *sys.argv[1:]])}" if work else "Nothing is kept without --work."
        console.print(f"{stopped}. {where}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    console.print(score_table(scores, title=f"Scores on {source.name}" if source is not None else "Cost"))
    for remark in dict.fromkeys(filter(None, map(remark_on_retrieval, scores.values()))):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        _write(json_file, source.name if source is not None else None, scores, config.model_dump(mode="json"))


def _write(path: Path, data: str | None, scores: dict[str, Any], settings: dict[str, Any]) -> None:
    from cmapkd.provenance import describe_environment

    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"data": data, "models": scores, "settings": settings, "environment": describe_environment()}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _settings(tasks: str, settings: list[str]) -> dict[str, Any]:
    """The settings of the evaluation, as `--tasks` and `--set` state them."""
    from cmapkd.config import ConfigError, apply_overrides

    values: dict[str, Any] = {"tasks": tasks if tasks in ("auto", "all") else [t.strip() for t in tasks.split(",")]}
    for setting in settings:
        if not setting.partition("=")[1]:
            raise ConfigError(f"--set {setting!r} is not key=value")
    return apply_overrides(values, settings, where="evaluation settings")


def _named(models: list[str]) -> dict[str, str]:
    """Models by the name that tables and files show: `LABEL=MODEL`, else the model itself."""
    from cmapkd.config import ConfigError

    named: dict[str, str] = {}
    for text in models:
        label, equals, model = text.partition("=")
        if not (equals and model and re.fullmatch(r"[\w.@+-]+", label)) or Path(text).exists():
            label, model = text, text
        if label in named:
            raise ConfigError(f"two models are named {label!r}: give one of them another name, LABEL=MODEL")
        named[label] = model
    return named

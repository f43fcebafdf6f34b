"""`cmapkd evaluate`: score any model on any data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run folder, or a model name such as open_clip:ViT-B-32/laion2b_s34b_b79k.")
    ],
    data: Annotated[str, typer.Option(help="Source of images with captions or labels, for example scenes.")],
    split: Annotated[str, typer.Option(help="Split of a source that has several.")] = "val",
    tasks: Annotated[str, typer.Option(help="Comma-separated: retrieval, zero_shot; or auto.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Settings of the evaluation: key=value, repeatable.")
    ] = None,
) -> None:
    """Score a model: retrieval with all captions, zero-shot classification."""
    from rich.console import Console

    from cmapkd.config import ConfigError

    values: dict[str, object] = {"tasks": "auto" if tasks == "auto" else [task.strip() for task in tasks.split(",")]}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting!r} is not key=value")
        values[key] = value

    import torch

    from cmapkd.api import load
    from cmapkd.data.open import open_source
    from cmapkd.evaluation.run import EvaluationConfig
    from cmapkd.evaluation.run import evaluate as score
    from cmapkd.results import score_table

    config = EvaluationConfig.from_mapping(values, where="evaluation settings")
    source = open_source(data, split=split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scores = score(load(model).to(device), source, config, device=device)
    Console().print(score_table([(model, scores)], title=f"Scores on {source.name}"))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(
            json.dumps({"model": model, "data": source.name, **scores}, indent=2) + "\n", encoding="utf-8"
        )

"""`cmapkd evaluate`: score any models on any data, side by side."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmapkd.cli.command import command_line, tell_start

if TYPE_CHECKING:
    from rich.console import Console

    from cmapkd.evaluation.config import SuiteConfig
    from cmapkd.models.base import Model


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
            help="Comma-separated: retrieval, zero_shot, compositional, linear_probe, knn, vqa, captioning, detection, "
            "patch_text, calibration, agreement, efficiency; accuracy, of classifiers too; of models that write: "
            "answering, yes_no, describing, perplexity, token_agreement, generation, drafting; auto: the first two, "
            "beside a classifier accuracy, or the first four of models that write; all: whatever the data serve."
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
    """Score models side by side. Retrieval, zero-shot, questions, captions, detection, calibration, agreement, cost."""
    from rich.console import Console

    from cmapkd.config import counted
    from cmapkd.config.disk import check_writable
    from cmapkd.settings import check_source

    named, values = _named(models), _settings(tasks, settings or [])
    for given in filter(None, (data, train)):
        check_source(given)
    if json_file is not None:
        check_writable(json_file)

    tell_start(f"scoring {counted(len(named), 'model')}: starting PyTorch")
    import torch

    from cmapkd.data.open import open_source
    from cmapkd.evaluation.config import SuiteConfig
    from cmapkd.evaluation.suite import evaluate_models, training_source
    from cmapkd.evaluation.tasks import check_tasks
    from cmapkd.training import Interrupted

    check_tasks(config := SuiteConfig.from_mapping(values, where="evaluation settings"))  # before a model is loaded
    source = open_source(data, split=split) if data is not None else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()

    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    loaded = _loaded(named, say)
    config = _asked_as_trained(config, named, loaded, say)
    if source is not None:
        say(f"evaluating {counted(len(loaded), 'model')} on {counted(len(source), 'sample')} of {source.name}")
    try:
        heads_from = training_source(train, data)
        scores = evaluate_models(loaded, source, config, device=device, train=heads_from, work=work, console=console)
    except Interrupted as stopped:
        where = f"Go on with:\n  {command_line(*sys.argv[1:])}" if work else "Nothing is kept without --work."
        say(f"{stopped}. {where}")
        raise typer.Exit(130) from None
    title = f"Scores on {source.name}" if source is not None else "Cost"
    _show(console, scores, title, untrained=_untrained(loaded))
    if json_file is not None:
        _write(json_file, source.name if source is not None else None, scores, config.model_dump(mode="json"))


def _loaded(named: dict[str, str], say: Callable[[str], None]) -> dict[str, Model]:
    """The models by name; each is told of, because it may take long."""
    from cmapkd.api import load
    from cmapkd.models.untrained import remark_on_untrained

    loaded: dict[str, Model] = {}
    for number, (name, model) in enumerate(named.items(), 1):
        say(f"loading model {number} of {len(named)}: {name}")
        loaded[name] = made = load(model)
        if (remark := remark_on_untrained(made)) is not None:
            say(f"warning: {remark}")
    return loaded


def _asked_as_trained(
    config: SuiteConfig, named: dict[str, str], loaded: dict[str, Model], say: Callable[[str], None]
) -> SuiteConfig:
    """With the prompts of the runs among the models that write, where no others are set."""
    from cmapkd.models import GenerativeModel
    from cmapkd.run.prompts import prompts_of_runs

    prompts, told = prompts_of_runs(Path(named[name]) for name in loaded if isinstance(loaded[name], GenerativeModel))
    if told:
        say(told)
    if prompts is None:
        return config
    return config.model_copy(update={"writing": config.writing.like(prompts)})


def _untrained(models: dict[str, Model]) -> dict[str, list[str]]:
    """The towers or parts with random weights, by model."""
    from cmapkd.models.untrained import random_parts

    return {name: list(random_parts(model)) for name, model in models.items()}


def _show(console: Console, scores: dict[str, Any], title: str, untrained: dict[str, list[str]]) -> None:
    """The table, what it was measured on, and what to know of it; scores of random weights are marked as such."""
    from cmapkd.cli.show import show
    from cmapkd.evaluation.headline import remark_on_retrieval, scored_set
    from cmapkd.evaluation.table import score_table

    show(console, score_table(scores, title=title))
    lines = [*map(scored_set, scores.values()), *map(remark_on_retrieval, scores.values())]
    for name, towers in untrained.items():
        if towers:
            scores[name]["untrained"] = towers
            lines.append(f"warning: {name} is untrained: its scores are those of random weights")
    for line in dict.fromkeys(filter(None, lines)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _write(path: Path, data: str | None, scores: dict[str, Any], settings: dict[str, Any]) -> None:
    from cmapkd.config import ConfigError
    from cmapkd.config.disk import DiskError, write_text
    from cmapkd.provenance import describe_environment

    content = {"data": data, "models": scores, "settings": settings, "environment": describe_environment()}
    text = json.dumps(content, indent=2) + "\n"
    try:
        if path.exists() and not path.is_file():  # a terminal or a pipe
            path.write_text(text, encoding="utf-8")
        else:
            write_text(path, text, again="evaluate again")
    except (OSError, DiskError) as error:
        typer.echo(text)
        why = error.__cause__ or error
        raise ConfigError(f"{path} could not be written ({why}): its content is printed above") from None


def _settings(tasks: str, settings: list[str]) -> dict[str, Any]:
    """The settings of the evaluation, as `--tasks` and `--set` state them."""
    from cmapkd.config import ConfigError, apply_overrides
    from cmapkd.settings import check_evaluation

    values: dict[str, Any] = {"tasks": tasks if tasks in ("auto", "all") else [t.strip() for t in tasks.split(",")]}
    for setting in settings:
        if not setting.partition("=")[1]:
            raise ConfigError(f"--set {setting!r} is not key=value")
    values = apply_overrides(values, settings, where="evaluation settings")
    check_evaluation(values, where="evaluation settings")
    return values


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

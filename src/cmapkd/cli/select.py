"""`cmapkd select`: which pictures to label next, as a list of ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from cmapkd.data.types import Source
    from cmapkd.evaluation.embed import Embedded
    from cmapkd.models import Model

WAYS = ("pcoreset", "balance")


def select(
    data: Annotated[str, typer.Argument(help="The source to choose from; its labels are read by balance alone.")],
    by: Annotated[str, typer.Option("--by", help=f"How: {', '.join(WAYS)}.")],
    budget: Annotated[int, typer.Option(min=1, help="Number of samples to choose.")],
    out: Annotated[Path, typer.Option(help="File of the chosen ids, one a line. Read it with ?ids=FILE.")],
    model: Annotated[
        str | None, typer.Option(help="A classifier, or an image-text model: whose probabilities are looked at.")
    ] = None,
    labelled: Annotated[Path | None, typer.Option(help="File of ids that are labelled already.")] = None,
    draw: Annotated[int, typer.Option(min=0, help="Another number chooses others, by balance.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that are read at once.")] = 64,
) -> None:
    """Choose samples to label: far from the labelled ones, or as many of each class."""
    from cmapkd.cli.command import tell_start
    from cmapkd.config import ConfigError, closest, counted
    from cmapkd.config.disk import check_writable, write_text

    if by not in WAYS:
        raise ConfigError(f"--by {by!r}{closest(by, WAYS)}: give {' or '.join(WAYS)}")
    if by == "pcoreset" and model is None:
        raise ConfigError("--by pcoreset looks at a model's probabilities: name a model with --model")
    if out.exists():
        raise ConfigError(f"{out} is there already: remove it, or name another file")
    check_writable(out)
    tell_start(f"choosing among {data}: starting PyTorch")

    from cmapkd.data.open import open_source
    from cmapkd.data.picked import read_ids

    source = open_source(data, split="train")
    known = frozenset(read_ids(labelled)) if labelled is not None else frozenset()
    if model is None:
        chosen = _by_labels(source, known, budget, draw)
    else:
        if len(source) - len(known) < budget:  # there may be fewer, of pictures that cannot be read
            raise ConfigError(f"--budget is {budget}, and {len(source) - len(known)} samples are not labelled yet")
        seen, p = _probabilities(model, source, batch_size)
        chosen = _by_probabilities(seen.ids, p, known, budget, by=by, draw=draw)
    write_text(out, "\n".join(chosen) + "\n", again="choose again")
    typer.echo(f"{counted(len(chosen), 'id')} of {source.name}: {out}")


def _by_labels(source: Source, known: frozenset[str], budget: int, draw: int) -> list[str]:
    """As many of each label of the data; no picture is read where the source can."""
    from cmapkd.data.selection import balanced
    from cmapkd.data.types import BadSampleError
    from cmapkd.data.unseen import unseen

    ids: list[str] = []
    labels: list[int] = []
    for place in range(len(source)):
        try:
            sample = unseen(source, place)
        except BadSampleError:
            continue
        ids.append(sample.id)
        labels.append(-1 if sample.label is None or sample.id in known else sample.label)
    _check_known(known, ids)
    return [ids[place] for place in balanced(labels, ids, budget, draw=draw)]


def _check_known(known: frozenset[str], ids: Sequence[str]) -> None:
    """Raises ConfigError: an id that is labelled already is of no readable sample."""
    from cmapkd.config import ConfigError

    if missing := known - set(ids):
        raise ConfigError(f"{len(missing)} of the labelled ids are of no sample, the first {min(missing)!r}")


def _by_probabilities(
    ids: tuple[str, ...], p: Tensor, known: frozenset[str], budget: int, *, by: str, draw: int
) -> list[str]:
    from cmapkd.config import ConfigError
    from cmapkd.data.selection import balanced, greedy_k_centre

    _check_known(known, ids)
    free = [place for place, each in enumerate(ids) if each not in known]
    if len(free) < budget:
        raise ConfigError(f"--budget is {budget}, and {len(free)} samples are not labelled yet")
    if by == "balance":
        taken = balanced(p[free].argmax(1).tolist(), [ids[place] for place in free], budget, draw=draw)
        return [ids[free[place]] for place in taken]
    start = p[[place for place, each in enumerate(ids) if each in known]]
    return [ids[free[place]] for place in greedy_k_centre(p[free], start, budget).tolist()]


def _probabilities(name: str, source: Source, batch_size: int) -> tuple[Embedded, Tensor]:
    """What the model answers to all readable pictures; of two heads each has half, as published."""
    import torch

    from cmapkd.api import load
    from cmapkd.config import ConfigError
    from cmapkd.evaluation.embed import embed
    from cmapkd.models import Classifier, ImageEncoder
    from cmapkd.models.classifier import mixed
    from cmapkd.models.contracts import both_towers

    model: Model = load(name)
    if not isinstance(model, ImageEncoder):
        raise ConfigError(f"--model needs a model that classifies or embeds pictures, and {model.name} {model.does}")
    if not isinstance(model, Classifier):
        both_towers(model, "cmapkd select")
    elif model.rule is None:
        raise ConfigError(f"{model.name} has no classes yet: train it first")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen = embed(model, source, batch_size=batch_size, device=device)
    if isinstance(model, Classifier):
        assert model.rule is not None
        if len(model.rule.heads) == 2:
            first, second = (seen.logits[head] for head in model.rule.heads)
            return seen, mixed(first, second, alpha=0.5, beta=1.0)
        return seen, model.probabilities(seen.logits)
    return seen, _zero_shot(model, seen, source, device)


def _zero_shot(model: Model, seen: Embedded, source: Source, device: object) -> Tensor:
    from cmapkd.config import ConfigError
    from cmapkd.data.templates import get_class_names, get_templates
    from cmapkd.models.contracts import both_towers
    from cmapkd.models.texts import class_vectors

    embedding = both_towers(model, "cmapkd select")
    names = get_class_names(None, source)
    if not names:
        raise ConfigError(f"{source.name} names no classes, and {model.name} answers by their texts")
    weights = class_vectors(embedding, names, get_templates("auto", source), device=str(device))
    scale = embedding.log_logit_scale.detach().exp().cpu()
    answers: Tensor = (scale * seen.images @ weights.T).softmax(-1)
    return answers

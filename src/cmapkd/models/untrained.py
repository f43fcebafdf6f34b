"""Parts of models that nobody has trained: a model by a name without weights is random, and scores at chance."""

from __future__ import annotations

from collections.abc import Collection

from cmapkd.models.base import DualEncoder, ImageEncoder, Model
from cmapkd.models.generative import GenerativeModel


def random_parts(model: Model) -> tuple[str, ...]:
    """The towers of a model that embeds, or the parts of one that writes, that have random weights."""
    if isinstance(model, ImageEncoder):
        return model.random_towers
    return model.random_parts if isinstance(model, GenerativeModel) else ()


def note_trained(model: Model) -> None:
    """Says that no part of the model is random any more."""
    if isinstance(model, ImageEncoder):
        model.random_towers = ()
    elif isinstance(model, GenerativeModel):
        model.random_parts = ()


def named_parts(model: Model) -> str:
    """`text tower`, or `projector and head`, for a sentence: what has random weights."""
    names = list(random_parts(model))
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{listed} tower" if isinstance(model, ImageEncoder) else listed


def remark_on_untrained(model: Model) -> str | None:
    """One line that says what has random weights, and what to name instead; None where nothing has."""
    random = random_parts(model)
    if not random:
        return None
    whole = len(random) > 1 if isinstance(model, DualEncoder) else {"vision", "language"} <= set(random)
    what = f"{model.name} is untrained" if whole else f"the {named_parts(model)} is untrained"
    named = "open_clip:ARCHITECTURE/TAG" if isinstance(model, ImageEncoder) else "hf:FOLDER"
    return (
        f"{what}: its weights are random{'' if model.name in what else f' ({model.name})'}. Name trained ones, such as "
        f"{named}, a model's folder, or a checkpoint."
    )


def remark_on_unlearned(model: Model, learning: Collection[str] | None = None) -> str | None:
    """One line that says which random parts of a student never learn; None where all do.

    Args:
        learning: the parts that the training lets learn; None: all that are not frozen.
    """
    parameters = dict(model.named_parameters())
    stuck = [
        part
        for part in random_parts(model)
        if (names := model.parts.get(part))
        and (
            (learning is not None and part not in learning)
            or not any(parameters[name].requires_grad for name in names if name in parameters)
        )
    ]
    frozen = model.frozen_levels if isinstance(model, ImageEncoder) else None
    still = {"image": frozen.image_levels, "text": frozen.text_levels} if frozen is not None else {}
    stuck += [f"frozen_blocks of {part}" for part in random_parts(model) if part not in stuck and still.get(part)]
    if not stuck:
        return None
    return (
        f"{', '.join(stuck)} of {model.name} {'has' if len(stuck) == 1 else 'have'} random weights and will not learn: "
        "name trained weights or a checkpoint, or let them learn (options.frozen, lora.learn, training.train_parts)"
    )

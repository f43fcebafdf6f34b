"""What the doctor sees in the models: what they are, how they fit together, whether their weights make sense."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Literal

import torch

from cmapkd.config import counted
from cmapkd.data.records import iter_captions
from cmapkd.data.types import BadSampleError, ModelInput, Source
from cmapkd.diagnosis.finding import Finding
from cmapkd.evaluation.efficiency import weight_bytes
from cmapkd.models import Classifier, DualEncoder, Model
from cmapkd.models.activation import activation_losses, assumption
from cmapkd.models.parts import word_tables
from cmapkd.models.untrained import named_parts, remark_on_unlearned, remark_on_untrained
from cmapkd.objectives.common import unit

SANITY_PAIRS = 32
LOPSIDED = 4  # times the image tower: a text tower of that size surprises who counts a student by its picture side
CLEARLY = 0.1  # of the loss: by so much must an activation be better before the other one counts as wrong


def check_model(role: str, model: DualEncoder, source: Source) -> Iterator[Finding]:
    spec = model.image_spec
    levels = f"{len(model.image_levels)} image and {len(model.text_levels)} text levels"
    yield Finding(
        "ok",
        role,
        f"{model.name}: {model.num_parameters():,} parameters, {spec.size} px ({spec.fit}, {spec.interpolation}, mean "
        f"{_numbers(spec.mean)}, std {_numbers(spec.std)}), joint width {model.embed_dim}, {levels}",
    )
    if "text" not in model.towers:
        return
    texts = list(itertools.islice(iter_captions(source), 4 * SANITY_PAIRS))
    if not texts:
        return
    tokens = model.tokenizer(texts)
    full = (tokens.mask.sum(1) >= model.tokenizer.context_length).float().mean().item()
    detail = (
        f"vocabulary {model.tokenizer.vocab_size:,}, longest of {counted(len(texts), 'caption')} "
        f"{int(tokens.mask.sum(1).max())} of {model.tokenizer.context_length} tokens"
    )
    if model.whole_texts is not None:
        detail += f"; texts are padded to {model.tokenizer.context_length}: {model.whole_texts}"
    if full > 0.05:
        yield Finding("note", f"{role} tokenizer", f"{detail}; {100 * full:.0f} % fill the context and may be cut off")
    else:
        yield Finding("ok", f"{role} tokenizer", detail)


def check_classifier(role: str, model: Classifier) -> Iterator[Finding]:
    spec = model.image_spec
    yield Finding(
        "ok",
        role,
        f"{model.name}: {model.num_parameters():,} parameters in its image tower, {spec.size} px ({spec.fit}, "
        f"{spec.interpolation}, mean {_numbers(spec.mean)}, std {_numbers(spec.std)}), features of width "
        f"{model.embed_dim}; the method adds its heads",
    )


def check_weights(
    role: str, model: Model, *, teaches: bool, learning: Collection[str] | None = None
) -> Iterator[Finding]:
    """Whether towers, or parts of a model that writes, have random weights: fatal in a teacher, usual in a student that
    learns them.

    Args:
        learning: the parts of a student that the training lets learn; None: all that are not frozen.
    """
    why = remark_on_untrained(model)
    if not teaches and (stuck := remark_on_unlearned(model, learning)) is not None:
        yield Finding("problem", f"{role} weights", stuck)
    elif why is not None:
        yield (
            Finding("problem", f"{role} weights", why)
            if teaches
            else Finding(
                "ok",
                f"{role} weights",
                f"random in the {named_parts(model)}: it learns from scratch",
            )
        )


def check_size(role: str, model: DualEncoder) -> Iterator[Finding]:
    """Parameters of each tower and of the text tower's word table, and megabytes on disk."""
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    towers = {part: sum(numbers[name] for name in names) for part, names in model.parts.items()}
    table = sum(each.weight.numel() for each in word_tables(model, model.tokenizer.vocab_size))
    image, text = towers.get("image", 0), towers.get("text", 0)
    size = weight_bytes(model)
    detail = (
        f"image tower {millions(image)}, text tower {millions(text)}, {millions(table)} of it the table of words; "
        f"{size['fp32'] / 1e6:,.1f} MB on disk, {size['fp16'] / 1e6:,.1f} MB in fp16"
    )
    if role == "student" and text > LOPSIDED * image:
        detail += (
            f". The text tower is {text / max(1, image):.0f} times the image tower: where texts are embedded on the "
            "device too, make it smaller (docs/models.md)"
        )
        yield Finding("note", f"{role} size", detail)
    else:
        yield Finding("ok", f"{role} size", detail)


def size_beside(ratio: float) -> str:
    """The student's size beside the teacher's.

    Args:
        ratio: the teacher's parameters over the student's.
    """
    if ratio < 1:
        return f"the student has {1 / ratio:.3g} times the parameters of the teacher: it is larger, so nothing is saved"
    return f"the student has {1 / ratio:.1%} of the teacher's parameters ({ratio:.1f} times smaller)"


def compare_sizes(student: DualEncoder, teacher: DualEncoder) -> Iterator[Finding]:
    ratio = teacher.num_parameters() / student.num_parameters()
    level: Literal["ok", "note"] = "ok" if ratio > 1 else "note"
    yield Finding(level, "pair", size_beside(ratio))
    if student.embed_dim != teacher.embed_dim:
        yield Finding(
            "ok",
            "pair",
            f"joint widths differ ({student.embed_dim} and {teacher.embed_dim}): linear projections are trained",
        )
    if student.image_spec != teacher.image_spec:
        yield Finding("ok", "pair", "image preprocessing differs: each model prepares the same view its own way")
    if student.image_spec.size > teacher.image_spec.size:
        yield Finding(
            "note",
            "pair",
            f"the student sees {student.image_spec.size} px, more than its teacher's {teacher.image_spec.size}",
        )


def pairs_of(model: DualEncoder, source: Source) -> ModelInput | None:
    """A few pictures from all over the source, as the model reads them, each with its first caption.

    None where fewer than two have a caption.
    """
    images, texts = [], []
    for index in range(0, len(source), max(1, len(source) // SANITY_PAIRS)):
        try:
            sample = source[index]
        except BadSampleError:
            continue
        if sample.captions:
            images.append(model.image_spec(sample.image))
            texts.append(sample.captions[0])
        if len(texts) == SANITY_PAIRS:
            break
    return ModelInput(torch.stack(images), model.tokenizer(texts)) if len(texts) > 1 else None


@torch.no_grad()
def check_sanity(what: str, teacher: DualEncoder, source: Source) -> Iterator[Finding]:
    """How often a teacher finds the right caption among a few: a broken checkpoint or normalisation shows here."""
    pairs = pairs_of(teacher, source)
    if pairs is None:
        return
    image = unit(teacher.encode_image(pairs.images).embedding)
    text = unit(teacher.encode_text(pairs.texts).embedding)
    similarity, number = image @ text.T, len(image)
    right = (similarity.argmax(1) == torch.arange(number)).float().mean().item()
    detail = (
        f"finds the right one of {number} captions for {100 * right:.0f} % of the images (chance {100 / number:.0f} %)"
    )
    if right < 3 / number:
        yield Finding("problem", f"{what} sanity", f"{detail}: check its weights, preprocessing and tokenizer")
    else:
        yield Finding("ok", f"{what} sanity", detail)


def check_activation(what: str, model: DualEncoder, source: Source) -> Iterator[Finding]:
    """Whether weights that fit GELU and QuickGELU alike do better with the one that is not assumed."""
    assumed = assumption(model)
    if assumed is None:
        return
    what = f"{what} activation"
    pairs = pairs_of(model, source)
    if pairs is None:
        yield Finding("note", what, f"{assumed} Here there are no captions to compare them on.")
        return
    (mine, loss), (other, its_loss) = activation_losses(model, pairs).items()
    detail = f"over {len(pairs.images)} pairs the loss is {loss:.3f} with {mine}, and {its_loss:.3f} with {other}"
    if its_loss < (1 - CLEARLY) * loss:
        quick = str(other == "quick_gelu").lower()
        yield Finding("problem", what, f"{detail}: set options.quick_gelu: {quick}, which these weights want")
    elif its_loss < loss:
        yield Finding("note", what, f"{detail}: too close to tell. {assumed}")
    else:
        yield Finding("ok", what, detail)


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def millions(number: int) -> str:
    """`1.09 M` of 1,090,000; small numbers as they are."""
    return f"{number / 1e6:.3g} M" if number >= 100_000 else f"{number:,}"

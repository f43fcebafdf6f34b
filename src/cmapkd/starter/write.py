"""The recipe as a commented YAML file, checked before it is written."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from cmapkd.config import ConfigError, counted
from cmapkd.config.disk import writing
from cmapkd.provenance import describe_environment
from cmapkd.run import RunConfig
from cmapkd.starter.look import Looked
from cmapkd.starter.student import Measured

LARGEST_BATCH = 256
EPOCHS = 10
HINTON = "method: {name: hinton, form: classes}"


def compose(looked: Looked, chosen: Measured, *, teacher: str | None, command: str) -> str:
    """The text of the recipe.

    Args:
        teacher: by name; None: the student learns from the data alone.
        command: what made it, for its first line.
    """
    batch = _batch_size(looked.samples)
    steps = EPOCHS * (looked.samples // batch)
    said = "captions of their own" if looked.captioned else "captions made of their classes"
    machine = describe_environment()
    lines = [
        f"# Written by: {command}",
        "# Check it with cmapkd doctor, then train with cmapkd distill. cmapkd settings explains every key.",
        "",
    ]
    if teacher is not None:
        lines += [
            "# The large model that teaches. Its weights are fetched once, unless it is a folder or a packaged model.",
            f"teacher: {_text(teacher)}",
            "",
        ]
    lines += [
        f"# {chosen.megabytes:.1f} MB of weights in float32, both towers. On this machine ({machine['cpu']},",
        f"# {chosen.threads} thread{'s'[: chosen.threads != 1]}) a picture takes {chosen.image_ms:.1f} ms and a text "
        f"{chosen.text_ms:.1f} ms, one at a time; another machine differs.",
        f"student: {json.dumps(chosen.student)}",
        "",
        *_method(looked, teacher),
        "",
        f"# {counted(looked.samples, 'picture')} to train on, with {said}. Paths start where the command runs.",
        *(f"# {remark}." for remark in looked.remarks),
        "data:",
        *(f"  {role}: {_text(source)}" for role, source in looked.sources.items()),
        "  workers: 0                # processes that read pictures; doctor says when more would help",
        "",
        f"# {EPOCHS} passes over the data are {counted(steps, 'step')} here. More, and larger batches, teach more.",
        "training:",
        f"  epochs: {EPOCHS}",
        f"  batch_size: {batch}",
        "optim:",
        f"  warmup_steps: {max(1, min(100, steps // 10))}          # steps in which the learning rate rises",
    ]
    if teacher is not None:
        lines += [
            "",
            "# Trains the same student without the teacher too: what the teacher gave. none takes half the time.",
            "baseline: scratch",
        ]
    if not looked.captioned:
        lines += [
            "",
            "# Pictures of one class share a caption, so retrieval would count right answers as wrong.",
            "evaluation: {tasks: zero_shot}",
        ]
    return "\n".join(lines) + "\n"


def _method(looked: Looked, teacher: str | None) -> list[str]:
    """The method that docs/choose_method.md names for such data."""
    known = "# How it learns: cmapkd methods lists the others. Only contrastive needs no teacher."
    if teacher is None:
        return [known, "method: contrastive"]
    if looked.captioned:
        return [known, "method: clip_kd"]
    return [known, "# classes: the student learns which classes the teacher sees in a picture.", HINTON]


def write_recipe(path: Path, text: str) -> None:
    """Writes the recipe to a new file, once it is known to be one.

    Raises:
        ConfigError: there is a file of that name, or its folder is not there.
    """
    RunConfig.from_mapping(OmegaConf.to_container(OmegaConf.create(text), resolve=False), where=f"recipe {path}")
    try:
        with writing(path.parent, again="write the recipe again"), path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists, and init overwrites nothing: name another file with --out") from None
    except FileNotFoundError:
        raise ConfigError(f"there is no folder {path.parent} to write {path.name} to") from None


def _batch_size(samples: int) -> int:
    """The largest power of two that leaves a few batches in an epoch, at most `LARGEST_BATCH`.

    Raises:
        ConfigError: there are too few samples to tell apart.
    """
    if samples < 4:
        raise ConfigError(f"{samples} samples are too few to train on: a batch needs several pictures to tell apart")
    return int(min(LARGEST_BATCH, 2 ** ((samples // 2).bit_length() - 1)))


def _text(value: str) -> str:
    """A string as YAML reads it back, whatever is in it."""
    return json.dumps(value, ensure_ascii=False)

"""Models by name or folder: `family:rest`, the same everywhere, each built by its family's adapter."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from cmapkd.config import ConfigError, closest
from cmapkd.data.random import key_of
from cmapkd.models.base import DualEncoder, Model
from cmapkd.models.config import FAMILIES, InheritConfig, ModelConfig
from cmapkd.models.contracts import dual
from cmapkd.models.errors import explained
from cmapkd.models.families import family as family_of
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.inherit import inherit_weights
from cmapkd.models.kept_tokens import texts_given
from cmapkd.models.quiet import quiet
from cmapkd.models.storage import DESCRIPTION, read_description
from cmapkd.models.untrained import note_trained

_LISTING = ("tiny", "tiny_vlm")  # families that know all of their names
_LISTED = 5  # folders that a message names


def build_model(
    config: ModelConfig | str, *, captions: Iterable[str] | None = None, teacher: Model | None = None
) -> Model:
    """The model that `config` names, in eval mode, float32, on the CPU.

    Args:
        captions: training texts, read by an untrained `tiny` or `tiny_vlm` model to learn its vocabulary, and where
            the vocabulary is to be cut to them.
        teacher: what `inherit: teacher` takes the weights from, and an untrained `tiny_vlm` model its tokenizer.
    Raises:
        ConfigError: the name or an option is unknown, or there is nothing to inherit from.
        ValueError: weights are missing or do not fit.
    """
    config = ModelConfig.from_mapping(config, where="model") if isinstance(config, str) else config
    folder = Path(config.name)
    family, colon, rest = config.name.partition(":")
    words = texts_given(captions, config.name) if config.vocabulary == "texts" else None
    if family in FAMILIES and colon:
        with explained(config.name) if Path(rest).exists() else nullcontext():
            model = _checked(_built(family, rest, config, captions, teacher), family)
    elif folder.is_dir():
        if config.options:
            raise ConfigError(
                f"model folder {folder} fixes its architecture: options {sorted(config.options)} do not apply"
            )
        model = load_model(folder)
        if config.init == "scratch":
            raise ConfigError(f"init: scratch needs a family name; {folder} is a trained model's folder")
        if config.inherit is not None:
            raise ConfigError(f"inherit would replace every weight of the trained model in {folder}: name a family's")
    else:
        raise _unknown(config.name)
    if config.inherit is not None:
        model = _inherited(model, config.inherit, teacher)
    if config.checkpoint is not None:
        model.load_checkpoint(config.checkpoint, averaged=config.weights == "ema")
    if config.inherit is not None or config.checkpoint is not None:
        note_trained(model)
    if words is not None:
        model = _of_fewer_words(model, words)
    return _of_dtype(model, config).eval()


def build_teacher(config: ModelConfig, role: str = "teacher") -> Model:
    """The teacher that `config` names, the same at every start and in every process, also where part of it is random.

    A teacher may have no weights for one tower. Its random ones are drawn from a seed of its role; the stream of random
    numbers that everything else draws from stays where it was.

    Args:
        role: the teacher's place in the run.
    Raises:
        ConfigError, ValueError: as `build_model`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key_of("teacher", role) % 2**63)
        return build_model(config)


def _built(
    family: str, rest: str, config: ModelConfig, captions: Iterable[str] | None, teacher: Model | None
) -> object:
    """What the family gives; it is told of the teacher if it asks for one."""
    with quiet(family):
        build = family_of(family).build
        if "teacher" in signature(build).parameters:
            return build(rest, config, captions, teacher=teacher)  # type: ignore[call-arg]
        return build(rest, config, captions)


def _of_dtype(model: Model, config: ModelConfig) -> Model:
    """The model with parameters of the config's precision; buffers, as tables of positions, stay as they are."""
    if config.dtype == "fp32":
        return model
    if not isinstance(model, GenerativeModel):
        raise ConfigError(f"dtype: {config.dtype} is for models that write, and {model.name} is none: leave it out")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _inherited(model: Model, config: InheritConfig, teacher: Model | None) -> DualEncoder:
    if config.name == "teacher" and teacher is None:
        raise ConfigError("inherit: teacher, but there is no teacher here: name a model or a folder")
    source = teacher if config.name == "teacher" and teacher is not None else build_model(config.name)
    student, larger = dual(model, "inherit"), dual(source, "inherit")
    student = student.with_tokenizer_of(larger)
    inherit_weights(student, larger, depth=config.depth)
    return student


def _of_fewer_words(model: Model, texts: Iterable[str]) -> DualEncoder:
    if isinstance(model, GenerativeModel):
        raise ConfigError(
            f"{model.name} writes, and its vocabulary is one of its options: set options.vocabulary: texts, and leave "
            "vocabulary out beside it"
        )
    return dual(model, "vocabulary").with_words_of(texts)


def load_model(folder: str | Path) -> Model:
    """A model that cmapkd saved: a `student/` folder, or the run folder around it.

    Raises:
        ValueError: no model is there, or its files do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no model folder {folder}{_beside(folder)}")
    if not (folder / DESCRIPTION).exists() and (folder / "student" / DESCRIPTION).exists():
        folder = folder / "student"
    if not (folder / DESCRIPTION).exists() and (folder / "config.yaml").exists():
        raise ValueError(
            f"{folder} is a run without student: it was stopped before its end. Go on with it (cmapkd distill RECIPE "
            f"--out {folder} --resume), or make one of a checkpoint: cmapkd finalize {folder}"
        )
    if not (folder / DESCRIPTION).exists() and (inside := _models_in(folder)):
        raise ValueError(f"{folder} is no model, but has {_listed(inside)}: name one of them")
    description = read_description(folder)
    with explained(f"model folder {folder}"):
        name = str(description["family"])
        with quiet(name):
            return _checked(family_of(name).load(folder, description, load_model), name).eval()


def check_name(name: str) -> None:
    """Refuses a name that can mean no model, without building or fetching one.

    Only families that list all of their names can be asked: `tiny:` and `tiny_vlm:`.

    Raises:
        ConfigError: it is no folder and names no family, or no model of one; with the closest name.
    """
    family, colon, rest = name.partition(":")
    if family in FAMILIES and colon:
        asked: Any = family_of(family)
        known = asked.names() if family in _LISTING else [rest]
        if rest not in known:
            raise ConfigError(f"there is no model {name}{closest(rest, known)}; known: {', '.join(known)}")
    elif not Path(name).is_dir():
        raise _unknown(name)


def _unknown(name: str) -> ConfigError:
    return ConfigError(
        f"there is no model {name!r}{_beside(Path(name))}: it is no folder, and names no family "
        f"({', '.join(family + ':' for family in FAMILIES)})"
    )


def _beside(path: Path) -> str:
    """The closest folder where a missing one was looked for, as a question; empty where none is near."""
    try:
        folders = [str(path.parent / each.name) for each in path.parent.iterdir() if each.is_dir()]
    except OSError:
        return ""
    return closest(str(path), folders)


def _models_in(folder: Path) -> list[Path]:
    """Runs and models right inside a folder, or in `runs` of a comparison."""
    try:
        inside = sorted(each for place in (folder, folder / "runs") if place.is_dir() for each in place.iterdir())
    except OSError:
        return []
    return [each for each in inside if (each / DESCRIPTION).exists() or (each / "student" / DESCRIPTION).exists()]


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:_LISTED])) + (f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else "")


def _checked(model: object, family: str) -> Model:
    """What a family of whatever package gave, if it is a model."""
    if not isinstance(model, Model):
        raise ConfigError(
            f"model family {family!r} of {FAMILIES.origin(family)} gave a {type(model).__name__}, which is no "
            "cmapkd.models.Model"
        )
    return model

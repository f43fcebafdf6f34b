"""What data say: captions or classes, how many samples, and which sources a recipe can train and measure on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cmapkd.config import ConfigError, counted
from cmapkd.data.left_out import without_caption
from cmapkd.data.open import SourceWarning, open_source
from cmapkd.data.types import BadSampleError, Source
from cmapkd.evaluation.suite import same_samples
from cmapkd.starter.find import find_sources

TEMPLATE = "a photo of a {}."
VAL_SHARE = 0.1
_LOOKED_AT = 32


@dataclass(frozen=True, slots=True)
class Looked:
    """What was seen.

    Attributes:
        sources: by role; `val` is always there.
        samples: in the training source.
        classes: names of the labels; empty where there are none.
        captioned: whether pictures have captions of their own.
        remarks: what was guessed.
    """

    sources: Mapping[str, str]
    samples: int
    classes: tuple[str, ...]
    captioned: bool
    remarks: tuple[str, ...]


def look(path: str | Path) -> Looked:
    """Finds the data at `path`, or that it names as a source, opens them and reads a few samples.

    Raises:
        ConfigError: nothing there can be read, or it has neither captions nor classes.
    """
    sources = find_sources(path)
    remarks: list[str] = []
    opened = _open(sources["train"], remarks)
    if sources.get("val") == sources["train"] and same_samples(opened, _open(sources["val"], [], split="val")):
        del sources["val"]  # a kind that may have splits, and a file that has none
    captioned, readable, bad = _captions(opened)
    if bad:
        remarks.append(
            f"{bad} of {readable + bad} samples that were looked at cannot be read: cmapkd doctor names the first one, "
            "and training stops above data.max_bad_share, 1 % by default"
        )
    if not readable:
        raise ConfigError(f"none of the first samples of {opened.name} can be read: cmapkd doctor says why")
    classes = tuple(opened.class_names or ())
    if not captioned:
        if len(classes) < 2 and _is_asked(opened):
            raise ConfigError(
                f"{opened.name} has questions or dialogues and no captions. cmapkd init makes recipes for models that "
                "embed pictures and texts: start from a recipe of models that write, see docs/generative.md"
            )
        if len(classes) < 2:
            raise ConfigError(
                f"{opened.name} has neither captions nor several class folders: a student learns from pictures with "
                "texts. docs/data.md shows where captions are read from."
            )
        remarks.append(f"no captions: each picture says '{TEMPLATE}' of its class")
        sources = {role: _with(source, f"captions={TEMPLATE}") for role, source in sources.items()}
    if "val" not in sources:
        share = f"{1 - VAL_SHARE:g}"
        remarks.append(
            f"no validation data: {100 * VAL_SHARE:.0f} % of the pictures, chosen by their ids, are held back"
        )
        train = sources["train"]
        sources = {**sources, "train": _with(train, f"part=0-{share}"), "val": _with(train, f"part={share}-1")}
    used = _open(sources["train"], [], require_captions=True)
    if left_out := without_caption(used):
        remarks.append(f"{counted(left_out, 'picture')} to train on without a caption: left out")
    ordered: dict[str, str] = {role: sources[role] for role in ("train", "val", "test") if role in sources}
    return Looked(ordered, len(used), classes, captioned, tuple(dict.fromkeys(remarks)))


def _open(spec: str, remarks: list[str], *, split: str = "train", require_captions: bool = False) -> Source:
    """The source; what it warns of becomes a remark."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = open_source(spec, split=split, require_captions=require_captions)
    for each in caught:
        if issubclass(each.category, SourceWarning):
            remarks.append(str(each.message))
    return source


def _captions(source: Source) -> tuple[bool, int, int]:
    """Whether most samples have a caption; of those looked at, how many can be read, and how many cannot."""
    said = read = bad = 0
    for index in range(0, len(source), max(1, len(source) // _LOOKED_AT)):
        try:
            said += bool(source[index].captions)
        except BadSampleError:
            bad += 1
            continue
        read += 1
    return 2 * said > read, read, bad


def _is_asked(source: Source) -> bool:
    """Whether one of the first samples has a question or a dialogue."""
    for index in range(min(_LOOKED_AT, len(source))):
        try:
            sample = source[index]
        except BadSampleError:
            continue
        if sample.questions or sample.turns:
            return True
    return False


def _with(source: str, option: str) -> str:
    """The source's name with a further option."""
    return f"{source}{'&' if '?' in source else '?'}{option}"

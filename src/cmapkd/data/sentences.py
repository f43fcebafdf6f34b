"""Pools made of a sample's own sentences: single ones, and several of them as one text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cmapkd.data.random import uniforms
from cmapkd.data.types import Sample

SENTENCES = "sentences"  # the pool of single sentences
PASSAGES = "passages"  # the pool of several sentences as one text

LONGEST = 5  # sentences of a passage
_DRAWN = 8  # passages of a sample and view to choose from
_END = re.compile(r"(?<=[.!?])\s+")


def sentences_of(sample: Sample, caption: str, key: int) -> Sequence[str]:  # noqa: ARG001  as of every `TextMaker`
    """All sentences of the sample's captions, its own and synthetic ones; each once, in their order."""
    texts = (*sample.captions, *sample.texts.get("synthetic", ()))
    parts = (part.strip() for text in texts for part in _END.split(text))
    return tuple(dict.fromkeys(part for part in parts if part))


def passages_of(sample: Sample, caption: str, key: int) -> Sequence[str]:
    """Texts of one to five different sentences of the sample, in an order that is drawn; one of few has fewer.

    Args:
        key: names the draws.
    """
    sentences = sentences_of(sample, caption, key)
    if not sentences:
        return ()
    made = []
    for number in range(_DRAWN):
        length, *places = uniforms(1 + len(sentences), key, number)
        order = sorted(range(len(sentences)), key=places.__getitem__)[: 1 + int(length * LONGEST)]
        made.append(". ".join(sentences[place].removesuffix(".") for place in order))
    return made

"""The pictures and texts that an exported file is compared on, in every form in which clients give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cmapkd.data.types import BadSampleError, Source
from cmapkd.export.towers import TextRules
from cmapkd.models import DualEncoder

BATCHES = (1, 2, 7)  # a graph is captured with 3
NUM_PICTURES = 14
LONG = 200  # words
ODD_TEXTS = ("", "A Dog, RUNNING! (fast)", "café über naïve", "7 dogs & 2 cats", "🙂 a red ball")
"""Texts in which tokenizers differ."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Pictures and texts by the names that messages give them."""

    pictures: tuple[tuple[str, Image.Image], ...]
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a graph: its inputs by name, and the rows of the reference that it must give."""

    name: str
    feed: dict[str, np.ndarray]
    rows: list[int]


def draw_probes(source: Source) -> Probes:
    """The first readable pictures of a source, two of them made wide and tall; texts of 1, 5 and 200 of its words.

    Raises:
        ValueError: no sample of the source can be read.
    """
    pictures: list[tuple[str, Image.Image]] = []
    captions: list[str] = []
    for index in range(len(source)):
        try:
            sample = source[index]
        except BadSampleError:
            continue
        pictures.append((f"picture {sample.id}", sample.image.convert("RGB")))
        captions.extend(sample.captions)
        if len(pictures) == NUM_PICTURES:
            break
    if not pictures:
        raise ValueError(f"no sample of {source.name} can be read, and an export is compared on its pictures")
    name, first = pictures[0]
    width, height = first.size
    pictures += [
        (f"{name}, twice as wide", first.resize((2 * width, height))),
        (f"{name}, twice as high", first.resize((width, 2 * height))),
    ]
    words = " ".join(captions).split() or ["a", "photo", "of", "two", "dogs"]
    words = (words * (1 + LONG // len(words)))[:LONG]
    long = " ".join(words)
    named = [("a text of 1 word", words[0]), ("a text of 5 words", " ".join(words[:5]))]
    named += [(f"a text of {LONG} words", long)]
    named += [(f"the text {text!r}", text) for text in (*ODD_TEXTS, *dict.fromkeys(captions[:6]))]
    return Probes(tuple(pictures), tuple(named))


def picture_cases(model: DualEncoder, probes: Probes) -> tuple[Tensor, list[Case]]:
    """All pictures as the model's own preprocessing makes them, and the calls in batches of 1, 2 and 7."""
    pixels = torch.stack([model.image_spec(image) for _, image in probes.pictures])
    cases = [
        Case(f"pictures {first} in batches of {batch}", {"pixel_values": pixels[first : first + batch].numpy()}, rows)
        for batch, first, rows in _parts(len(pixels))
    ]
    return pixels, cases


def text_cases(model: DualEncoder, rules: TextRules, probes: Probes, *, full_length: bool = False) -> list[Case]:
    """Texts in batches of 1, 2 and 7; padded as the model's tokenizer does, and to the longest of the batch; and the
    longest one cut off without its end token.

    Args:
        full_length: each is padded to `context_length` instead.
    """
    texts = [text for _, text in probes.texts]
    cases = []
    if full_length:
        for batch, first, rows in _parts(len(texts)):
            tokens = model.tokenizer(texts[first : first + batch])
            more = (0, model.tokenizer.context_length - tokens.ids.shape[1])
            ids = F.pad(tokens.ids, more, value=_pad_id(model, texts))
            name = f"texts {first} in batches of {batch}"
            cases.append(_text_case(name, ids, F.pad(tokens.mask, more).long(), rules, rows))
        return cases
    for batch, first, rows in _parts(len(texts)):
        tokens = model.tokenizer(texts[first : first + batch])
        ids, mask = tokens.ids, tokens.mask.long()
        cases.append(_text_case(f"texts {first} in batches of {batch}", ids, mask, rules, rows))
        longest = int(mask.sum(1).max())
        if rules.any_length and longest < ids.shape[1]:
            cases.append(_text_case(f"{cases[-1].name}, short", ids[:, :longest], mask[:, :longest], rules, rows))
    row = next(number for number, (name, _) in enumerate(probes.texts) if str(LONG) in name)
    tokens = model.tokenizer(texts[row : row + 1])
    if rules.end_id is not None and int(tokens.ids[0, -1]) == rules.end_id:
        ids = tokens.ids.clone()
        ids[0, -1] = ids[0, -2]
        cases.append(_text_case("cut off without its end token", ids, tokens.mask.long(), rules, [row]))
    return cases


def _pad_id(model: DualEncoder, texts: Sequence[str]) -> int:
    """What the tokenizer itself puts behind a shorter text."""
    tokens = model.tokenizer([min(texts, key=len), max(texts, key=len)])
    return int(tokens.ids[0, -1])


def _text_case(name: str, ids: Tensor, mask: Tensor, rules: TextRules, rows: list[int]) -> Case:
    feed = {"input_ids": ids.numpy()} | ({"attention_mask": mask.numpy()} if rules.reads_mask else {})
    return Case(name, {key: np.ascontiguousarray(value) for key, value in feed.items()}, rows)


def _parts(total: int) -> Sequence[tuple[int, int, list[int]]]:
    """Batch size, first row and rows of each call. Batches of 1 and 2 take the first rows only: they are many."""
    return [
        (batch, first, list(range(first, min(first + batch, total))))
        for batch in BATCHES
        for first in range(0, total if batch == BATCHES[-1] else min(total, 6), batch)
    ]

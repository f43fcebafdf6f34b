"""Retrievals side by side: what each model finds first for the same captions, drawn by chance.

    uv run python benchmarks/draw_retrieval.py docs/images/retrieval.png --data "scenes@test?length=1000" \\
      --models teacher=tiny:scenes-teacher student=runs/first alone=runs/first/baseline

A frame is green where the picture is the right one. Beside it stands the place of the right picture. Pictures that may
not be shown to others are left out with `--words`: each stands there as one of its own captions.
"""

from __future__ import annotations

import argparse
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import cmapkd
from cmapkd.data.open import open_source
from cmapkd.data.types import Sample
from cmapkd.models.base import DualEncoder

SIDE, GAP, ASKED, HEAD, PLACE = 132, 12, 220, 44, 76
RIGHT, NEAR, FAR, WRONG, INK = "#1f8f5c", "#222222", "#8a909a", "#c9ced6", "#222222"


@dataclass(frozen=True)
class Shown:
    """One query: a caption, its own picture's place, and each model's first pictures with the right one's rank."""

    caption: str
    own: int
    first: dict[str, list[int]]
    rank: dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True, help="pictures with captions, as cmapkd names them")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=MODEL")
    parser.add_argument("--captions", type=int, default=6, help="how many queries")
    parser.add_argument("--first", type=int, default=1, help="pictures of each model")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of the captions")
    parser.add_argument("--words", action="store_true", help="captions in place of pictures")
    arguments = parser.parse_args()
    source = open_source(arguments.data, require_captions=True)
    samples = [source[place] for place in range(len(source))]
    chosen = random.Random(arguments.seed).sample(range(len(samples)), arguments.captions)
    asked = {place: random.Random(f"{arguments.seed} {place}").choice(samples[place].captions) for place in chosen}
    first: dict[int, dict[str, list[int]]] = {place: {} for place in chosen}
    rank: dict[int, dict[str, int]] = {place: {} for place in chosen}
    for name, path in (given.split("=", 1) for given in arguments.models):
        model = cmapkd.load(path)
        assert isinstance(model, DualEncoder), f"{path} has no embeddings to retrieve with"
        similarity = model.embed([each.image for each in samples], list(asked.values())).similarity
        for place, scores in zip(chosen, similarity.T, strict=True):
            first[place][name] = scores.argsort(descending=True, stable=True)[: arguments.first].tolist()
            rank[place][name] = int((scores >= scores[place]).sum())  # of equal scores the last place
    rows = [Shown(asked[place], place, first[place], rank[place]) for place in chosen]
    sheet = drawn(rows, samples, words=arguments.words)
    sheet.save(arguments.out)
    for row in rows:
        print(row.caption, row.rank)


def drawn(rows: list[Shown], samples: Sequence[Sample], *, words: bool) -> Image.Image:
    """The sheet: a line for each query, a column for each model, the right picture's place in large type."""
    names = list(rows[0].first)
    column = len(rows[0].first[names[0]]) * (SIDE + GAP) + PLACE + GAP
    row_height = SIDE + 2 * GAP
    sheet = Image.new("RGB", (ASKED + len(names) * column, HEAD + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    font, bold, large = (ImageFont.load_default(size=size) for size in (14, 16, 30))
    draw.text((GAP, 12), "asked for", fill=INK, font=bold)
    for index, name in enumerate(names):
        draw.text((ASKED + index * column, 12), name, fill=INK, font=bold)
    for line, row in enumerate(rows):
        top = HEAD + line * row_height
        draw.multiline_text((GAP, top), textwrap.fill(row.caption.strip(" ."), 25), fill=INK, font=font, spacing=4)
        for index, name in enumerate(names):
            left = ASKED + index * column
            for place, image in enumerate(row.first[name]):
                _box(sheet, draw, left + place * (SIDE + GAP), top, samples[image], right=image == row.own, words=words)
            rank, beside = row.rank[name], left + len(row.first[name]) * (SIDE + GAP)
            colour = RIGHT if rank == 1 else NEAR if rank <= 10 else FAR
            draw.text((beside, top + SIDE // 2 - 26), f"{rank:,}", fill=colour, font=large)
            draw.text((beside, top + SIDE // 2 + 10), f"of {len(samples):,}", fill=FAR, font=font)
    return sheet


def _box(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, sample: Sample, *, right: bool, words: bool
) -> None:
    if words:
        small = ImageFont.load_default(size=12)
        text = textwrap.fill(sample.captions[0].strip(" ."), 18, max_lines=7, placeholder=" ...")
        draw.multiline_text((left + 8, top + 8), text, fill=INK, font=small, spacing=2)
    else:
        sheet.paste(sample.image.convert("RGB").resize((SIDE, SIDE)), (left, top))
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=RIGHT if right else WRONG, width=4)


if __name__ == "__main__":
    main()

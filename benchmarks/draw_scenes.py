"""The picture in docs/scenes.md: scenes of each difficulty with one caption each.

uv run python benchmarks/draw_scenes.py docs/images/scenes.png
"""

from __future__ import annotations

import sys
import textwrap

from PIL import Image, ImageDraw, ImageFont

from cmapkd.data.scenes.source import ScenesSource

SIDE, TEXT, GAP, COLUMNS = 150, 92, 14, 5


def main(path: str) -> None:
    rows = ("easy", "standard", "hard")
    width = COLUMNS * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + TEXT + GAP + 22) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    bold = ImageFont.load_default(size=15)
    for row, difficulty in enumerate(rows):
        source = ScenesSource("train", difficulty=difficulty)
        top = GAP + row * (SIDE + TEXT + GAP + 22)
        draw.text((GAP, top - 4), difficulty, fill="black", font=bold)
        for column in range(COLUMNS):
            sample = source[column * 97 + 5]
            left = GAP + column * (SIDE + GAP)
            sheet.paste(sample.image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top + 18))
            caption = textwrap.fill(sample.captions[column % len(sample.captions)], 25)
            draw.multiline_text((left, top + SIDE + 22), caption, fill="#333333", font=font, spacing=2)
    sheet.save(path)


if __name__ == "__main__":
    main(sys.argv[1])

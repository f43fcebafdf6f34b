"""Pictures as small data addresses, encoded anew: nothing of the source's bytes reaches the page."""

from __future__ import annotations

import base64
import io

from PIL import Image

from cmapkd.report.blocks import Picture

SIDES = (128, 96, 64)
"""Pixels of the longer side: the first, and smaller ones where the page would grow too large."""

_QUALITY = 70


def thumbnail(image: Image.Image, side: int, description: str) -> Picture:
    """The whole picture, at most `side` pixels long, as WebP without metadata."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, format="WEBP", quality=_QUALITY, method=4)
    address = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode("ascii")
    return Picture(address, small.width, small.height, description)

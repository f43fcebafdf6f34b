"""Draws a scene: cached masks of every shape and texture, blended into the image."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from cmapkd.data.scenes.world import Background, Colour, Scene, SceneObject

_LEVELS = {"gradient": 16, "noisy": 16, "lined": 2, "tiled": 2}  # steps from a background's colour to its shade
_DARK_INK = frozenset({"orange", "yellow", "lime", "cyan", "pink"})  # textures are drawn dark on these, light on others

Contour = list[tuple[float, float]]


def render(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB image of `size` x `size` pixels."""
    image = _background(scene.background, size)
    if scene.clutter:
        draw = ImageDraw.Draw(image)
        width = max(1, round(size / 64))
        for speck in scene.clutter:
            start = (speck.x * size, speck.y * size)
            draw.line([start, (start[0] + speck.dx * size, start[1] + speck.dy * size)], fill=speck.rgb, width=width)
    for thing in scene.objects:
        pixels, left, top = _pixels(thing, size)
        corner = (left, top)
        image.paste(thing.rgb, corner, shape_mask(thing.shape, pixels))
        if thing.texture != "solid":
            image.paste(_ink(thing), corner, texture_mask(thing.shape, thing.texture, pixels, size))
    return image


def pixel_box(thing: SceneObject, size: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom (exclusive) of an object's pixels, whether or not others cover some of them."""
    pixels, left, top = _pixels(thing, size)
    x0, y0, x1, y1 = _extent(thing.shape, pixels)
    return max(0, left + x0), max(0, top + y0), min(size, left + x1), min(size, top + y1)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, pixels: int) -> Image.Image:
    """Anti-aliased coverage of a shape that fills a square of `pixels`."""
    fine = _fine(pixels)
    return _draw_shape(shape, pixels * fine).resize((pixels, pixels), Image.Resampling.BOX)


@lru_cache(maxsize=16384)
def texture_mask(shape: str, texture: str, pixels: int, size: int) -> Image.Image:
    """Coverage of the second colour of a textured shape, in an image of `size` pixels."""
    fine = _fine(pixels)
    side = pixels * fine
    if texture == "outlined":
        ink = Image.new("L", (side, side))
        draw = ImageDraw.Draw(ink)
        width = 2 * max(1.3, 0.03 * size) * fine
        for contour in _contours(shape):
            points = _scaled(contour, side)
            draw.line([*points, points[0], points[1]], fill=255, width=round(width), joint="curve")
    else:
        ink = Image.fromarray(_pattern(texture, side, scale=max(size, 48) * fine))
    return ImageChops.multiply(ink, _draw_shape(shape, side)).resize((pixels, pixels), Image.Resampling.BOX)


def _pixels(thing: SceneObject, size: int) -> tuple[int, int, int]:
    """The side of an object's mask, and its left and top pixel."""
    pixels = round(thing.diameter * size)
    return pixels, round(thing.x * size - pixels / 2), round(thing.y * size - pixels / 2)


@lru_cache(maxsize=4096)
def _extent(shape: str, pixels: int) -> tuple[int, int, int, int]:
    return shape_mask(shape, pixels).getbbox() or (0, 0, pixels, pixels)


def _ink(thing: SceneObject) -> Colour:
    red, green, blue = thing.rgb
    if thing.colour in _DARK_INK:
        return red // 5, green // 5, blue // 5
    return (red + 4 * 255) // 5, (green + 4 * 255) // 5, (blue + 4 * 255) // 5


def _background(background: Background, size: int) -> Image.Image:
    if background.texture == "plain":
        return Image.new("RGB", (size, size), background.rgb)
    levels = _LEVELS[background.texture]
    (red, green, blue), (to_red, to_green, to_blue) = background.rgb, background.shade
    ramp = []
    for level in range(levels):
        share = level / (levels - 1)
        ramp.append(
            int(red + share * (to_red - red))
            | int(green + share * (to_green - green)) << 8
            | int(blue + share * (to_blue - blue)) << 16
        )
    tile = _background_tile(background.texture, background.variant, size)
    return Image.frombytes("RGB", (size, size), np.array(ramp, "<u4").take(tile).tobytes(), "raw", "RGBX")


@lru_cache(maxsize=256)
def _background_tile(texture: str, variant: int, size: int) -> NDArray[np.intp]:
    """Levels of a background's texture; `variant` is its direction, its phase or its grain of noise."""
    rows, columns = np.mgrid[0:size, 0:size] / size
    if texture == "gradient":
        angle = variant * math.pi / 4
        along = (columns - 0.5) * math.cos(angle) + (rows - 0.5) * math.sin(angle)
        level = (along - along.min()) / (along.max() - along.min())
    elif texture == "noisy":
        uniforms = np.random.Generator(np.random.Philox(key=variant)).random((64, 64))
        cells = np.minimum((np.arange(size) * 64) // size, 63)
        level = uniforms[cells][:, cells]
    elif texture == "lined":
        level = ((rows + variant / 64) % 0.125 < 0.042).astype(np.float64)
    else:  # tiled
        level = (((rows + variant / 64) // 0.125 + (columns + variant / 48) // 0.125) % 2).astype(np.float64)
    levels: NDArray[np.intp] = np.minimum(level * _LEVELS[texture], _LEVELS[texture] - 1).astype(np.intp)
    return levels


def _fine(pixels: int) -> int:
    """Supersampling of a mask: 8 where it is small, less where its many pixels make that pointless."""
    return 8 if pixels <= 40 else 4


def _pattern(texture: str, side: int, *, scale: int) -> NDArray[np.uint8]:
    """Where a texture's ink lies; `scale` is the image's side in the same supersampled pixels."""
    rows, columns = (np.mgrid[0:side, 0:side] + 0.5 - side / 2) / scale
    if texture == "striped":
        inked = (rows + columns + 0.02) % 0.1 < 0.046
    elif texture == "checkered":
        inked = (np.floor(rows / 0.055) + np.floor(columns / 0.055)) % 2 == 0
    else:  # dotted
        inked = ((rows % 0.078) - 0.039) ** 2 + ((columns % 0.078) - 0.039) ** 2 < 0.023**2
    ink: NDArray[np.uint8] = inked.astype(np.uint8) * 255
    return ink


def _draw_shape(shape: str, side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    for place, contour in enumerate(_contours(shape)):
        draw.polygon(_scaled(contour, side), fill=0 if place else 255)
    return mask


def _scaled(contour: Contour, side: int) -> Contour:
    return [((1 + x) * side / 2, (1 + y) * side / 2) for x, y in contour]


def _arc(radius: float, start: float, stop: float, number: int, x: float = 0.0) -> Contour:
    """Points of an arc around (x, 0), angles in degrees, 0 to the right and 90 downwards."""
    angles = [math.radians(start + (stop - start) * step / number) for step in range(number + 1)]
    return [(x + radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _contours(shape: str) -> list[Contour]:
    """A shape as polygons within about the unit circle, y downwards; a second polygon is a hole."""
    if shape == "circle":
        return [_arc(0.98, 0, 360, 72)]
    if shape == "square":
        return [[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]]
    if shape == "triangle":
        return [[(0, -0.9), (0.9, 0.65), (-0.9, 0.65)]]
    if shape == "star":
        tips, dents = _arc(1.0, -90, 270, 5), _arc(0.42, -54, 306, 5)
        return [[point for pair in zip(tips[:5], dents[:5], strict=True) for point in pair]]
    if shape == "cross":
        corners = [(0.32, 0.94), (0.32, 0.32), (0.94, 0.32)]
        quarters = [corners, [(x, -y) for x, y in corners[::-1]]]
        right = [point for quarter in quarters for point in quarter]
        return [right + [(-x, -y) for x, y in right]]
    if shape == "diamond":
        return [[(0, -1), (0.8, 0), (0, 1), (-0.8, 0)]]
    if shape == "heart":
        angles = [math.tau * step / 72 for step in range(72)]
        bump = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in angles]
        return [[(math.sin(t) ** 3 * 0.92, -0.1 - y * 0.92 / 16) for t, y in zip(angles, bump, strict=True)]]
    if shape == "hexagon":
        return [_arc(1.0, 0, 300, 5)]
    if shape == "ring":
        return [_arc(0.98, 0, 360, 72), _arc(0.5, 0, 360, 72)]
    # crescent: the outer arc, and back along a circle shifted to the right
    return [[*_arc(0.98, 50, 310, 60), *_arc(0.76, -82, -278, 60, x=0.52)]]

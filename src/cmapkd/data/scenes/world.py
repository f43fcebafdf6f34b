"""The scene of a (difficulty, split, index): its objects and background, before any pixel or word."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from cmapkd.data.scenes.draws import Draws, key_of
from cmapkd.data.scenes.spec import BACKGROUNDS, COLOURS, DIFFICULTIES, HELD_OUT, SHAPES, WORLD_VERSION, SceneSpec

Colour = tuple[int, int, int]

WORLD_SEED = 2024
COMPACT = frozenset({"circle", "square", "triangle", "diamond", "heart", "hexagon"})
"""Shapes filled enough that two of them, placed to overlap, do so in pixels from every direction."""

_CLEAR = 1.13  # centres further apart than this many times the radii: no pixel of the two meets
_OVER = (0.54, 0.61)  # the same for a pair meant to overlap
_OVER_POINTED = (0.47, 0.52)  # and for two shapes that are thin in some directions
_POINTED = frozenset({"triangle", "diamond", "heart"})
_MARGIN = 0.03  # free border of the image
_STEPS = (0.95, 1.0, 1.05)  # sizes of one name differ by this much
_RESIDUES = {0: "val", 1: "test"}  # of a content hash modulo 10; the other eight are train's


class SceneObject(NamedTuple):
    """One object; x, y (the centre) and diameter are fractions of the image's side, y grows downwards.

    `column` is left, center or right and `row` top, center or bottom, or empty where neither is beyond doubt.
    """

    colour: str
    shape: str
    texture: str
    size: str
    diameter: float
    x: float
    y: float
    column: str
    row: str
    rgb: Colour

    @property
    def name(self) -> str:
        """Colour and shape, as classes and boxes are named."""
        return f"{self.colour} {self.shape}"


class Background(NamedTuple):
    """The background: its two names, its colour, the shade its texture is drawn in, and which variant of it."""

    colour: str
    texture: str
    rgb: Colour
    shade: Colour
    variant: int


class Speck(NamedTuple):
    """An unnamed grey line (or, when short, a speck) behind the objects; fractions of the image's side."""

    x: float
    y: float
    dx: float
    dy: float
    rgb: Colour


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything there is in one image. Objects are in drawing order; the first one is the largest.

    `overlaps` are (back, front) positions of the pairs that overlap; no other two objects share a pixel. `key` seeds
    the words, so that a scene always gets the same captions.
    """

    objects: tuple[SceneObject, ...]
    background: Background
    overlaps: tuple[tuple[int, int], ...]
    clutter: tuple[Speck, ...]
    difficulty: str
    key: bytes


class _Theme(NamedTuple):
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    textures: tuple[str, ...]
    backgrounds: tuple[str, ...]


class _Draft(NamedTuple):
    """An object's words, before it has a place."""

    colour: str
    shape: str
    texture: str
    size: str


def scene_at(difficulty: str, split: str, index: int) -> Scene:
    """The scene at an index: a pure function of its arguments, the world's version and its seed.

    Which of train, val and test may show a scene is decided by a hash of its content (see `content_split`), so those
    splits share no content; `ood` scenes always, and others never, contain a pair of `HELD_OUT`.
    """
    spec = DIFFICULTIES[difficulty]
    key = key_of(WORLD_VERSION, WORLD_SEED, difficulty, split, index)
    theme = _theme(difficulty, split, index // spec.family)
    draws = Draws(key)
    while True:
        drafts = _draft(draws, spec, theme, held_out=split == "ood")
        colour = draws.pick(theme.backgrounds)
        if split != "ood" and _content_split(drafts, colour) != split:
            continue
        placed = _place(draws, spec, drafts)
        if placed is not None:
            objects, overlaps = placed
            background = _background(draws, spec, colour)
            clutter = tuple(_speck(draws, background) for _ in range(draws.between(*spec.clutter)))
            return Scene(objects, background, overlaps, clutter, difficulty, key)


def content_split(scene: Scene) -> str:
    """The one split that may show what this scene contains: its objects' words (in any order) on its background."""
    if any((thing.colour, thing.shape) in HELD_OUT for thing in scene.objects):
        return "ood"
    return _content_split([_Draft(*thing[:4]) for thing in scene.objects], scene.background.colour)


def _content_split(drafts: list[_Draft], background: str) -> str:
    content = "|".join(sorted([" ".join(draft) for draft in drafts])) + "|" + background
    residue = int.from_bytes(blake2b(content.encode(), digest_size=8).digest(), "little") % 10
    return _RESIDUES.get(residue, "train")


@lru_cache(maxsize=4096)
def _theme(difficulty: str, split: str, family: int) -> _Theme:
    spec = DIFFICULTIES[difficulty]
    draws = Draws(key_of(WORLD_VERSION, WORLD_SEED, "theme", difficulty, split, family))
    if not draws.chance(spec.themed):
        return _Theme(tuple(COLOURS), SHAPES, spec.textures, tuple(BACKGROUNDS))
    colours = draws.some(tuple(COLOURS), draws.between(*spec.theme_values))
    shapes = draws.some(SHAPES, draws.between(*spec.theme_values))
    if split == "ood" and not any((colour, shape) in HELD_OUT for colour in colours for shape in shapes):
        shapes[0] = next(shape for shape in SHAPES if (colours[0], shape) in HELD_OUT)
    textures = draws.some(spec.textures, draws.between(*spec.theme_values))
    return _Theme(tuple(colours), tuple(shapes), tuple(textures), tuple(draws.some(tuple(BACKGROUNDS), 2)))


def _draft(draws: Draws, spec: SceneSpec, theme: _Theme, *, held_out: bool) -> list[_Draft]:
    """The objects' words, largest first; exactly one object has the largest size."""
    number = draws.between(*spec.num_objects)
    sizes = [name for name, _ in spec.diameters]
    lead = len(sizes) - 1 if number > 1 and draws.chance(0.75) else draws.between(min(1, number - 1), len(sizes) - 1)
    drafts = []
    for place in range(number):
        colour, shape = draws.pick(theme.colours), draws.pick(theme.shapes)
        while not held_out and (colour, shape) in HELD_OUT:
            colour, shape = draws.pick(theme.colours), draws.pick(theme.shapes)
        size = sizes[lead] if place == 0 else sizes[draws.between(0, lead - 1)]
        drafts.append(_Draft(colour, shape, draws.pick(theme.textures), size))
    if held_out and not any(draft[:2] in HELD_OUT for draft in drafts):
        pairs = [(c, s) for c in theme.colours for s in theme.shapes if (c, s) in HELD_OUT]
        place = draws.between(0, number - 1)
        colour, shape = draws.pick(pairs)
        drafts[place] = drafts[place]._replace(colour=colour, shape=shape)
    drafts[1:] = sorted(drafts[1:], key=lambda draft: -sizes.index(draft.size))
    return drafts


def _place(
    draws: Draws, spec: SceneSpec, drafts: list[_Draft]
) -> tuple[tuple[SceneObject, ...], tuple[tuple[int, int], ...]] | None:
    """Objects at places where they meet only in the pairs meant to, or None when no room was found."""
    diameters, uniform = dict(spec.diameters), draws.uniform
    circles: list[tuple[float, float, float]] = []
    overlaps: list[tuple[int, int]] = []
    objects = []
    for place, draft in enumerate(drafts):
        diameter = diameters[draft.size] * draws.pick(_STEPS)
        radius = diameter / 2
        low, room = radius + _MARGIN, 1 - diameter - 2 * _MARGIN
        partner = _partner(draws, drafts, place, overlaps) if draws.chance(spec.overlap) else None
        for _ in range(24):
            if partner is None:
                x, y = low + uniform() * room, low + uniform() * room
            else:
                other_x, other_y, other_radius = circles[partner]
                nearest, furthest = _OVER_POINTED if {draft.shape, drafts[partner].shape} <= _POINTED else _OVER
                distance = (nearest + uniform() * (furthest - nearest)) * (radius + other_radius)
                angle = uniform() * math.tau
                x, y = other_x + distance * math.cos(angle), other_y + distance * math.sin(angle)
                if not (low <= x <= low + room and low <= y <= low + room):
                    continue
            for other, (other_x, other_y, other_radius) in enumerate(circles):
                if math.hypot(x - other_x, y - other_y) < _CLEAR * (radius + other_radius) and other != partner:
                    break
            else:
                break
        else:
            return None
        if partner is not None:
            overlaps.append((partner, place))
        circles.append((x, y, radius))
        column, row = _region(x, "left", "right"), _region(y, "top", "bottom")
        objects.append(SceneObject(*draft, diameter, x, y, column, row, _jitter(draws, COLOURS[draft.colour], 24)))
    return tuple(objects), tuple(overlaps)


def _partner(draws: Draws, drafts: list[_Draft], place: int, overlaps: list[tuple[int, int]]) -> int | None:
    """An earlier object to lie over: both compact, neither in another pair, so that both stay mostly visible."""
    if drafts[place].shape not in COMPACT:
        return None
    taken = {member for pair in overlaps for member in pair}
    free = [other for other in range(place) if other not in taken and drafts[other].shape in COMPACT]
    return draws.pick(free) if free else None


def _region(at: float, low: str, high: str) -> str:
    if at < 0.36:
        return low
    if at > 0.64:
        return high
    return "center" if 0.43 < at < 0.57 else ""


def _background(draws: Draws, spec: SceneSpec, colour: str) -> Background:
    rgb = _jitter(draws, BACKGROUNDS[colour], 12)
    towards, share = (255, 0.24) if sum(rgb) < 300 else (0, 0.2)
    shade = tuple(int(channel + (towards - channel) * share) for channel in rgb)
    return Background(
        colour, draws.pick(spec.background_textures), rgb, (shade[0], shade[1], shade[2]), draws.between(0, 7)
    )


def _speck(draws: Draws, background: Background) -> Speck:
    length, angle = draws.uniform() ** 2 * 0.3, draws.uniform() * math.tau
    grey = 90 + int(draws.uniform() * 80)
    grey = grey - 70 if background.colour == "gray" else grey
    return Speck(
        draws.uniform(), draws.uniform(), length * math.cos(angle), length * math.sin(angle), (grey, grey, grey)
    )


def _jitter(draws: Draws, rgb: Colour, width: int) -> Colour:
    red, green, blue = rgb
    uniform, half = draws.uniform, width // 2
    red, green, blue = (
        red + int(uniform() * width) - half,
        green + int(uniform() * width) - half,
        blue + int(uniform() * width) - half,
    )
    return min(255, max(0, red)), min(255, max(0, green)), min(255, max(0, blue))

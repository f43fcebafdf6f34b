"""What a scene can contain, and the named difficulties."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

WORLD_VERSION = 1
"""Raised with any change of pixels, captions, questions or boxes: it is part of every random key and fingerprint."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "hexagon", "ring", "crescent")

COLOURS = MappingProxyType(
    {
        "red": (214, 38, 38),
        "orange": (246, 138, 26),
        "yellow": (250, 224, 46),
        "lime": (150, 232, 40),
        "green": (24, 132, 58),
        "cyan": (52, 208, 218),
        "blue": (42, 84, 224),
        "purple": (132, 44, 188),
        "pink": (248, 132, 190),
        "brown": (132, 80, 40),
    }
)

TEXTURES = ("solid", "striped", "dotted", "checkered", "outlined")

BACKGROUNDS = MappingProxyType(
    {
        "white": (246, 246, 246),
        "gray": (128, 128, 128),
        "black": (14, 14, 14),
        "beige": (226, 208, 172),
        "navy": (14, 22, 78),
        "mint": (186, 236, 208),
        "lavender": (206, 198, 242),
        "maroon": (84, 12, 30),
    }
)

BACKGROUND_TEXTURES = ("plain", "gradient", "noisy", "lined", "tiled")

HELD_OUT = frozenset((colour, SHAPES[(3 * place + 2) % len(SHAPES)]) for place, colour in enumerate(COLOURS))
"""(colour, shape) pairs that only the split `ood` shows: one per colour and one per shape, 10 of the 100."""

CLASS_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

SPLITS = ("train", "val", "test", "ood")


@dataclass(frozen=True, slots=True)
class SceneSpec:
    """One difficulty. Lengths are fractions of the image's side, probabilities lie in [0, 1].

    `diameters` lists the sizes an object can have, by name and in ascending order. Scenes come in families of `family`
    consecutive indices that share a theme, with probability `themed`: a theme restricts colours, shapes and textures
    to `theme_values` (least, most) values each, so that a caption tells siblings apart only by what belongs to what.
    """

    num_objects: tuple[int, int]  # least and most, both possible
    diameters: tuple[tuple[str, float], ...]
    textures: tuple[str, ...] = TEXTURES
    background_textures: tuple[str, ...] = BACKGROUND_TEXTURES
    themed: float = 0.0
    theme_values: tuple[int, int] = (2, 3)
    family: int = 1
    overlap: float = 0.0  # chance that an object, after the first, is placed over another one
    clutter: tuple[int, int] = (0, 0)  # least and most specks and lines that no caption names
    details: float = 14.0  # bits a caption aims to give: it goes on adding details until it has them
    coarse: float = 0.06  # share of captions that stop early and stay general


DIFFICULTIES = MappingProxyType(
    {
        "easy": SceneSpec(
            num_objects=(1, 3),
            diameters=(("medium", 0.28), ("large", 0.44)),
            textures=("solid",),
            background_textures=("plain",),
            details=13.0,
        ),
        "standard": SceneSpec(
            num_objects=(2, 5),
            diameters=(("small", 0.18), ("medium", 0.28), ("large", 0.42)),
            themed=0.6,
            family=4,
            overlap=0.15,
        ),
        "hard": SceneSpec(
            num_objects=(3, 5),
            diameters=(("small", 0.16), ("medium", 0.23), ("large", 0.34)),
            themed=0.9,
            theme_values=(2, 2),
            family=8,
            overlap=0.35,
            clutter=(4, 10),
            details=16.0,
        ),
    }
)

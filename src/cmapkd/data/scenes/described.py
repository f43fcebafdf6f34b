"""What holds of every object of a class: its colour and its shape told apart, and their other words."""

from __future__ import annotations

from hashlib import blake2b

from cmapkd.data.scenes.spec import CLASS_NAMES, COLOURS, SHAPES, WORLD_VERSION
from cmapkd.data.scenes.words import SYNONYMS

DESCRIPTIONS = ("true", "shuffled")


def described_classes(descriptions: str) -> tuple[tuple[str, ...], ...]:
    """Texts of each class by itself, in the order of `CLASS_NAMES`.

    Args:
        descriptions: `true`; or `shuffled`: each class has those of another one, a control.
    """
    texts = [_texts(colour, shape) for colour in COLOURS for shape in SHAPES]
    if descriptions == "true":
        return tuple(texts)
    keys = [blake2b(f"{WORLD_VERSION} {name}".encode()).digest() for name in CLASS_NAMES]
    order = sorted(range(len(texts)), key=keys.__getitem__)
    others = dict(zip(order, order[1:] + order[:1], strict=True))
    return tuple(texts[others[number]] for number in range(len(texts)))


def _texts(colour: str, shape: str) -> tuple[str, ...]:
    """`a red object`, `a disc`, `a red disc`: every statement is true of each object of this class."""
    colours, shapes = SYNONYMS.get(colour, (colour,)), SYNONYMS.get(shape, (shape,))
    of_colour = [f"{each} object" for each in colours]
    both = [f"{one} {other}" for one in colours for other in shapes if (one, other) != (colour, shape)]
    return tuple(f"an {text}" if text[0] in "aeiou" else f"a {text}" for text in (*of_colour, *shapes, *both))

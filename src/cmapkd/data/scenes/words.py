"""How the grammar names things: synonyms, plurals, numbers, noun phrases and places."""

from __future__ import annotations

from types import MappingProxyType

from cmapkd.data.scenes.claims import Description
from cmapkd.data.scenes.draws import Draws

NUMBERS = ("no", "one", "two", "three", "four", "five")

# the first one is the name itself
SYNONYMS = MappingProxyType(
    {
        "circle": ("circle", "disc"),
        "square": ("square", "box"),
        "cross": ("cross", "plus sign"),
        "diamond": ("diamond", "rhombus"),
        "ring": ("ring", "hoop"),
        "crescent": ("crescent", "moon"),
        "purple": ("purple", "violet"),
        "solid": ("solid", "filled"),
        "striped": ("striped", "stripy"),
        "dotted": ("dotted", "spotted"),
        "checkered": ("checkered", "checked"),
        "outlined": ("outlined", "bordered"),
        "small": ("small", "little", "tiny"),
        "medium": ("medium", "medium-sized"),
        "large": ("large", "big"),
        "noisy": ("noisy", "grainy"),
    }
)

# every name seven times in ten, its other words in equal shares of the rest
_WORDS = MappingProxyType({name: (name,) * (7 * (len(names) - 1)) + names[1:] * 3 for name, names in SYNONYMS.items()})

_PLURALS = MappingProxyType({"cross": "crosses", "box": "boxes", "rhombus": "rhombuses"})

WITH_TEXTURE = MappingProxyType(
    {
        "striped": " with stripes",
        "dotted": " with dots",
        "checkered": " with a checkered pattern",
        "outlined": " with a border",
    }
)

_PLACES = MappingProxyType(
    {
        ("left", "top"): ("in the top left corner", "at the upper left"),
        ("right", "top"): ("in the top right corner", "at the upper right"),
        ("left", "bottom"): ("in the bottom left corner", "at the lower left"),
        ("right", "bottom"): ("in the bottom right corner", "at the lower right"),
        ("center", "center"): ("in the center", "in the middle"),
        ("left", ""): ("on the left side", "at the left"),
        ("right", ""): ("on the right side", "at the right"),
        ("", "top"): ("at the top", "near the top edge"),
        ("", "bottom"): ("at the bottom", "near the bottom edge"),
    }
)


def synonym(draws: Draws, name: str) -> str:
    """The name or, three times in ten, another word for it."""
    words = _WORDS.get(name)
    return name if words is None else words[int(draws.uniform() * len(words))]


def plural(noun: str) -> str:
    """The plural of a shape's word."""
    return _PLURALS.get(noun, noun + "s")


def noun_phrase(draws: Draws, thing: Description, article: str = "a", *, number: int = 1) -> str:
    """`a small striped red circle`, from whatever is said of the object except its place."""
    colour, shape, texture, size, _, _ = thing
    before = after = ""
    if size:
        before = synonym(draws, size) + " "
    if texture:
        after = WITH_TEXTURE.get(texture, "") if draws.uniform() < 0.25 else ""
        if not after:
            before += synonym(draws, texture) + " "
    if colour:
        before += (synonym(draws, colour) if colour in _WORDS else colour) + " "
    noun = synonym(draws, shape) if shape else "object"
    phrase = f"{before}{noun if number == 1 else plural(noun)}{after}"
    if not article:
        return phrase
    return f"an {phrase}" if article == "a" and phrase[0] in "aeiou" else f"{article} {phrase}"


def place_phrase(draws: Draws, thing: Description) -> str:
    """`in the top left corner`, or nothing where no place is said."""
    if not (thing.column or thing.row):
        return ""
    return " " + draws.pick(_PLACES[thing.column, thing.row])


def listing(phrases: list[str]) -> str:
    """`a, b and c`."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]

"""Sentences of the grammar that say something else in one respect: a texture, a relation or a count."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cmapkd.data.scenes.spec import SHAPES, TEXTURES
from cmapkd.data.scenes.words import NUMBERS, SYNONYMS, WITH_TEXTURE, plural
from cmapkd.data.scenes.wrong import with_articles


def _any_of(words: Mapping[str, object]) -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + r")\b")


# every wording of a texture: its name, and whether it stands behind the noun
_TEXTURES = {word: (name, False) for name in TEXTURES for word in SYNONYMS[name]}
_TEXTURES |= {phrase.strip(): (name, True) for name, phrase in WITH_TEXTURE.items()}
_TEXTURE = _any_of(_TEXTURES)

# by relation: where the grammar says it and its opposite, and what it says instead; places use none of these words
_TURNS: dict[tuple[str, ...], tuple[re.Pattern[str], dict[str, str]]] = {
    relations: (re.compile(pattern), instead)
    for relations, pattern, instead in (
        (
            ("left", "right"),
            r"\b(?:left|right)(?= of\b)|(?<=on its )(?:left|right)\b",
            {"left": "right", "right": "left"},
        ),
        (("above", "below"), r"\b(?:above|below|under)\b", {"above": "below", "below": "above", "under": "above"}),
        (
            ("covers",),
            r"\b(?:partly covers|is in front of|is partly behind)\b",
            {
                "partly covers": "is partly behind",
                "is in front of": "is partly behind",
                "is partly behind": "is in front of",
            },
        ),
    )
}
TURNED = tuple(_TURNS)
"""Relations that `turned` exchanges: pairs of opposites, and one that is turned by exchanging its objects."""

_COUNT = _any_of(dict.fromkeys(NUMBERS[1:]))
_NOUNS = {
    form: (word, form != word)
    for word in ("object", *(word for shape in SHAPES for word in SYNONYMS.get(shape, (shape,))))
    for form in (word, plural(word))
}
_NOUN = _any_of(_NOUNS)
_VERB = re.compile(r"^there (is|are) ")


def texture_wordings(text: str) -> dict[str, str]:
    """The textures of objects that a text names, and the word that stands before a noun for each."""
    found = [(form, *_TEXTURES[form]) for form in _TEXTURE.findall(text)]
    return {name: name if behind else form for form, name, behind in found}


def retextured(text: str, instead: Mapping[str, str]) -> str | None:
    """`text` with other textures of objects; None where the new one has no wording in that place.

    Args:
        instead: by name, the word that stands before a noun for the new one.
    """
    lacking = False

    def other(found: re.Match[str]) -> str:
        nonlocal lacking
        name, behind = _TEXTURES[found[0]]
        if name not in instead:
            return found[0]
        new, _ = _TEXTURES[instead[name]]
        lacking |= behind and new not in WITH_TEXTURE
        return WITH_TEXTURE.get(new, "").strip() if behind else instead[name]

    changed = with_articles(_TEXTURE.sub(other, text))
    return None if lacking else changed


def turned(text: str, relations: tuple[str, ...], count: int) -> str | None:
    """`text` with the opposite of some relations in their place.

    Args:
        relations: one of `TURNED`.
        count: how many of them the sentence states; None is returned where it has not so many.
    """
    pattern, instead = _TURNS[relations]

    def opposite(found: re.Match[str]) -> str:
        before, after = text[: found.start()], text[found.end() :]
        if found[0] == "above" and before and not before.endswith(("is ", "and ")) and not after.startswith(" it"):
            return "under"  # the grammar's word where nothing stands between it and the object
        return instead[found[0]]

    changed, found = pattern.subn(opposite, text)
    return changed if found == count else None


def recounted(text: str, place: int, number: int, of: int) -> str | None:
    """`text` with another number in the place of one that it states, and the noun and verb that go with it.

    Args:
        place: which of its numbers.
        number: 1 to 5.
        of: how many numbers the sentence states; None is returned where it has not so many.
    """
    counts = list(_COUNT.finditer(text))
    if len(counts) != of:
        return None
    here = counts[place]
    before, after, verb = text[: here.start()], text[here.end() :], _VERB.match(text)
    if verb is not None and verb.end() == here.start():
        before = "there is " if number == 1 else "there are "

    def agreeing(found: re.Match[str]) -> str:
        word, _ = _NOUNS[found[0]]
        return word if number == 1 else plural(word)

    return before + NUMBERS[number] + _NOUN.sub(agreeing, after, count=1)

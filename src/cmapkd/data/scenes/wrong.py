"""Captions with wrong attributes: noisy pairs of a known share, to measure what helps against noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from cmapkd.data.scenes.draws import Draws, key_of
from cmapkd.data.scenes.spec import COLOURS, SHAPES
from cmapkd.data.scenes.words import SYNONYMS, plural
from cmapkd.data.scenes.world import Scene

KINDS = {"colour": tuple(COLOURS), "shape": SHAPES}
# every word for a colour or a shape: its kind, its place among them, whether it is a plural
_WORDS = {
    form: (kind, place, form != word)
    for kind, names in KINDS.items()
    for place, name in enumerate(names)
    for word in SYNONYMS.get(name, (name,))
    for form in ((word,) if kind == "colour" else (word, plural(word)))
}
_SINGULARS = {
    form: word
    for names in KINDS.values()
    for name in names
    for word in SYNONYMS.get(name, (name,))
    for form in (word, plural(word))
}
_ANY_WORD = re.compile(r"\b(?:" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r")\b")
_COLOURED = re.compile(
    r"\b({}) ({})\b".format(
        *(
            "|".join(sorted((word for word, (of, _, _) in _WORDS.items() if of == kind), key=len, reverse=True))
            for kind in KINDS
        )
    )
)
_ARTICLE = re.compile(r"\ban? (?=(\w))")


def with_wrong(scene: Scene, captions: Sequence[str], share: float) -> tuple[str, ...]:
    """`captions`, of which each is with probability `share` one whose colours and shapes are all others.

    Within a caption the same word becomes the same other word. A pure function of the scene.
    """
    draws = Draws(key_of(scene.key, "wrong"))
    changed = []
    for caption in captions:
        wrong, shifts = draws.chance(share), {kind: draws.between(1, len(names) - 1) for kind, names in KINDS.items()}
        changed.append(_shifted(caption, shifts) if wrong else caption)
    return tuple(changed)


def wordings(text: str, kind: str) -> dict[str, str]:
    """The colours, or shapes, that a text names, and the word that it has for each."""
    found = {form: _WORDS[form] for form in _ANY_WORD.findall(text)}
    return {KINDS[of][place]: _SINGULARS[form] for form, (of, place, _) in found.items() if of == kind}


def renamed(text: str, new_name: Callable[[str, str], str]) -> str:
    """`text` with other words for its colours and shapes: `new_name(kind, name)`, where kind is `colour` or `shape`.

    A word that is the old name itself changes nothing, whatever the text has in its place.
    """

    def other(found: re.Match[str]) -> str:
        kind, place, several = _WORDS[found[0]]
        name = new_name(kind, KINDS[kind][place])
        if name == KINDS[kind][place]:
            return found[0]
        return plural(name) if several else name

    return with_articles(_ANY_WORD.sub(other, text))


def named_things(text: str) -> list[tuple[str, str]]:
    """The coloured shapes that a text names, as (colour, shape): a word for a colour with one for a shape behind it."""
    things = []
    for found in _COLOURED.finditer(text.lower()):
        (_, colour, _), (_, shape, _) = _WORDS[found[1]], _WORDS[found[2]]
        things.append((KINDS["colour"][colour], KINDS["shape"][shape]))
    return things


def with_articles(text: str) -> str:
    """`text` with `an` before vowels and `a` elsewhere."""
    return _ARTICLE.sub(lambda found: "an " if found[1] in "aeiou" else "a ", text)


def _shifted(caption: str, shifts: dict[str, int]) -> str:
    def new_name(kind: str, name: str) -> str:
        names = KINDS[kind]
        return names[(names.index(name) + shifts[kind]) % len(names)]

    return renamed(caption, new_name)

"""Captions with wrong attributes: noisy pairs of a known share, to measure what helps against noise."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cmapkd.data.scenes.draws import Draws, key_of
from cmapkd.data.scenes.spec import COLOURS, SHAPES
from cmapkd.data.scenes.words import SYNONYMS, plural
from cmapkd.data.scenes.world import Scene

_KINDS = {"colour": tuple(COLOURS), "shape": SHAPES}
# every word for a colour or a shape: its kind, its place among them, whether it is a plural
_WORDS = {
    form: (kind, place, form != word)
    for kind, names in _KINDS.items()
    for place, name in enumerate(names)
    for word in SYNONYMS.get(name, (name,))
    for form in ((word,) if kind == "colour" else (word, plural(word)))
}
_ANY_WORD = re.compile(r"\b(?:" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r")\b")
_ARTICLE = re.compile(r"\ban? (?=(\w))")


def with_wrong(scene: Scene, captions: Sequence[str], share: float) -> tuple[str, ...]:
    """`captions`, of which each is with probability `share` one whose colours and shapes are all others.

    Within a caption the same word becomes the same other word. A pure function of the scene.
    """
    draws = Draws(key_of(scene.key, "wrong"))
    changed = []
    for caption in captions:
        wrong, shifts = draws.chance(share), {kind: draws.between(1, len(names) - 1) for kind, names in _KINDS.items()}
        changed.append(_shifted(caption, shifts) if wrong else caption)
    return tuple(changed)


def _shifted(caption: str, shifts: dict[str, int]) -> str:
    def other(found: re.Match[str]) -> str:
        kind, place, several = _WORDS[found[0]]
        name = _KINDS[kind][(place + shifts[kind]) % len(_KINDS[kind])]
        return plural(name) if several else name

    text = _ANY_WORD.sub(other, caption)
    return _ARTICLE.sub(lambda found: "an " if found[1] in "aeiou" else "a ", text)

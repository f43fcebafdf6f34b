"""Hard negatives: captions that are changed in one respect, each proven to be false in its scene."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest

from cmapkd.data.scenes.claims import Claim, Condition, Description, Extreme, Ground, Number, Share, There, holds
from cmapkd.data.scenes.draws import Draws, key_of
from cmapkd.data.scenes.language import captions_with_claims
from cmapkd.data.scenes.rewording import TURNED, recounted, retextured, texture_wordings, turned
from cmapkd.data.scenes.source import SceneSample
from cmapkd.data.scenes.spec import COLOURS, SHAPES, TEXTURES
from cmapkd.data.scenes.words import NUMBERS, synonym
from cmapkd.data.scenes.wrong import named_things, renamed, wordings
from cmapkd.data.types import Sample

MOST = 8  # negatives of a caption
KINDS = ("exchanged", "relation", "count", "replaced")
"""What is changed: two attributes change places, a relation is turned, a number is another, an attribute is another."""

_ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "texture": TEXTURES}
_Said = tuple[str, Claim]


def negatives_of(sample: Sample, caption: str, key: int) -> Sequence[str]:
    """The texts of `named_negatives`."""
    return tuple(named_negatives(sample, caption, key))


def named_negatives(sample: Sample, caption: str, key: int) -> dict[str, str]:
    """Up to `MOST` sentences that say one thing otherwise than `caption`, and that the scene makes false, by kind.

    The kinds of `KINDS` take turns as long as each has any. Colours, shapes and textures change places or stand in for
    one that is named; `key` draws what is another. The change is made in the sentence and in the claim behind it alike,
    and is kept only if the changed claim does not hold. A caption with no known claim (in the second language, or made
    wrong on purpose) gets negatives of the scene's true captions. A sample that is no scene has none.
    """
    if not isinstance(sample, SceneSample):
        return {}
    scene = sample.scene
    said = captions_with_claims(scene)
    known = [pair for pair in said if pair[0] == caption] or said

    def false_ones(kind: str, change: Callable[[Sequence[_Said], Draws], Iterator[_Said]]) -> Iterator[tuple[str, str]]:
        for text, claim in change(known, Draws(key_of(key, kind))):
            if not holds(claim, scene):
                yield text, kind

    kinds = map(false_ones, KINDS, (_exchanged, _turned, _recounted, _replaced))
    found: dict[str, str] = {}
    for negative in chain.from_iterable(zip_longest(*kinds)):
        if negative is not None:
            found.setdefault(*negative)
            if len(found) == MOST:
                break
    return found


def things_right(sample: Sample, text: str) -> list[bool] | None:
    """Of each coloured shape that a text names, whether the scene has such an object; None where there is no scene.

    Sizes, textures, numbers and relations are not looked at.
    """
    if not isinstance(sample, SceneSample):
        return None
    there = {(thing.colour, thing.shape) for thing in sample.scene.objects}
    return [thing in there for thing in named_things(text)]


def _exchanged(known: Sequence[_Said], _draws: Draws) -> Iterator[_Said]:
    """With two colours, shapes or textures of the claim in each other's place."""
    for text, claim in known:
        for attribute in _ATTRIBUTES:
            named = sorted(_named(claim, attribute))
            for place, one in enumerate(named):
                for other in named[place + 1 :]:
                    words = texture_wordings(text) if attribute == "texture" else wordings(text, attribute)
                    yield from _with(text, claim, attribute, {one: other, other: one}, words)


def _replaced(known: Sequence[_Said], draws: Draws) -> Iterator[_Said]:
    """With another colour, shape or texture in the place of one of the claim's, in an order that is drawn."""
    options = [
        (text, claim, attribute, one, other)
        for text, claim in known
        for attribute, names in _ATTRIBUTES.items()
        for one in sorted(_named(claim, attribute))
        for other in sorted(set(names) - _named(claim, attribute))
    ]
    for text, claim, attribute, one, other in draws.some(options, len(options)):
        yield from _with(text, claim, attribute, {one: other}, {other: synonym(draws, other)})


def _turned(known: Sequence[_Said], _draws: Draws) -> Iterator[_Said]:
    """With the opposite of a relation, or with who covers whom exchanged."""
    for text, claim in known:
        stated = [relation for each in claim if isinstance(each, There) for relation, _, _ in each.relations]
        for relations in TURNED:
            count = sum(relation in relations for relation in stated)
            changed = turned(text, relations, count) if count else None
            if changed is not None:
                yield changed, tuple(_turn(each, relations) for each in claim)


def _recounted(known: Sequence[_Said], draws: Draws) -> Iterator[_Said]:
    """With one more or one less of what is counted, in an order that is drawn."""
    options = []
    for text, claim in known:
        places = [place for place, each in enumerate(claim) if isinstance(each, Number)]
        for count, place in enumerate(places):
            condition = claim[place]
            assert isinstance(condition, Number)
            for number in (condition.number - 1, condition.number + 1):
                changed = recounted(text, count, number, len(places)) if 0 < number < len(NUMBERS) else None
                if changed is not None:
                    options.append((changed, (*claim[:place], condition._replace(number=number), *claim[place + 1 :])))
    yield from draws.some(options, len(options))


def _with(text: str, claim: Claim, attribute: str, instead: dict[str, str], words: dict[str, str]) -> Iterator[_Said]:
    """The sentence and its claim with other names of one attribute; nothing where the grammar has no such sentence.

    Args:
        words: for the new names. A false sentence must not be known by its choice of words, so it has synonyms as
            often as a true one.
    """
    worded = {name: words.get(other, other) for name, other in instead.items()}
    changed = (
        retextured(text, worded)
        if attribute == "texture"
        else renamed(text, lambda of, name: worded.get(name, name) if of == attribute else name)
    )
    if changed is not None and changed != text:
        yield changed, tuple(_of_things(each, lambda thing: _thing(thing, attribute, instead)) for each in claim)


def _turn(condition: Condition, relations: tuple[str, ...]) -> Condition:
    if not isinstance(condition, There):
        return condition

    def opposite(relation: str, first: int, second: int) -> tuple[str, int, int]:
        if relation not in relations:
            return relation, first, second
        if len(relations) == 1:
            return relation, second, first
        return relations[1 - relations.index(relation)], first, second

    return condition._replace(relations=tuple(opposite(*each) for each in condition.relations))


def _of_things(condition: Condition, change: Callable[[Description], Description]) -> Condition:
    """The condition with `change` of every object that it describes."""
    if isinstance(condition, Ground):  # its colours and textures are others than those of objects
        return condition
    if isinstance(condition, There):
        return condition._replace(things=tuple(map(change, condition.things)))
    return condition._replace(thing=change(condition.thing))


def _thing(thing: Description, attribute: str, instead: dict[str, str]) -> Description:
    name = getattr(thing, attribute)
    changed: Description = thing._replace(**{attribute: instead.get(name, name)})
    return changed


def _named(claim: Claim, attribute: str) -> set[str]:
    """The colours, shapes or textures that a claim names."""
    things = [thing for condition in claim for thing in _things(condition)]
    return {getattr(thing, attribute) for thing in things} - {""}


def _things(condition: Condition) -> tuple[Description, ...]:
    if isinstance(condition, There):
        return condition.things
    return (condition.thing,) if isinstance(condition, Number | Extreme | Share) else ()

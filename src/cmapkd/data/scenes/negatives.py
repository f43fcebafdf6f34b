"""Hard negatives: captions with two colours or two shapes exchanged, each proven to be false in its scene."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from cmapkd.data.scenes.claims import Claim, Condition, Description, Extreme, Ground, Number, Share, There, holds
from cmapkd.data.scenes.draws import Draws
from cmapkd.data.scenes.language import captions_with_claims
from cmapkd.data.scenes.source import SceneSample
from cmapkd.data.scenes.world import Scene
from cmapkd.data.scenes.wrong import KINDS, renamed
from cmapkd.data.types import Sample

MOST = 8  # negatives of a caption


def negatives_of(sample: Sample, caption: str, key: int) -> Sequence[str]:
    """Up to `MOST` sentences that differ from `caption` in a colour or a shape, and that the scene makes false.

    First come all captions in which two named colours, or shapes, change places. Then colours or shapes that are drawn
    by `key` stand in for one that is named. The change is made in the sentence and in the claim behind it alike, and
    is kept only if the changed claim does not hold. A caption with no known claim (in the second language, or made
    wrong on purpose) gets negatives of the scene's true captions. A sample that is no scene has none.
    """
    if not isinstance(sample, SceneSample):
        return ()
    scene = sample.scene
    said = captions_with_claims(scene)
    known = [pair for pair in said if pair[0] == caption] or said
    draws = Draws(key.to_bytes(16, "little"))
    changed = chain(*(_exchanged(text, claim, scene) for text, claim in known), _replaced(known, scene, draws))
    found: dict[str, None] = {}
    for text in changed:
        found.setdefault(text)
        if len(found) == MOST:
            break
    return tuple(found)


def _exchanged(text: str, claim: Claim, scene: Scene) -> Iterator[str]:
    """With two colours, or two shapes, of the claim in each other's place."""
    for kind in KINDS:
        named = sorted(_named(claim, kind))
        for place, one in enumerate(named):
            for other in named[place + 1 :]:
                yield from _if_false(text, claim, scene, kind, one, other)


def _replaced(known: Sequence[tuple[str, Claim]], scene: Scene, draws: Draws) -> Iterator[str]:
    """With another colour, or shape, in the place of one of the claim's, in an order that is drawn."""
    options = [
        (text, claim, kind, one, other)
        for text, claim in known
        for kind, names in KINDS.items()
        for one in sorted(_named(claim, kind))
        for other in sorted(set(names) - _named(claim, kind))
    ]
    for text, claim, kind, one, other in draws.some(options, len(options)):
        yield from _if_false(text, claim, scene, kind, one, other)


def _if_false(text: str, claim: Claim, scene: Scene, kind: str, one: str, other: str) -> Iterator[str]:
    exchange = {one: other, other: one}
    changed = tuple(_condition(condition, kind, exchange) for condition in claim)
    if not holds(changed, scene):
        yield renamed(text, lambda of, name: exchange.get(name, name) if of == kind else name)


def _condition(condition: Condition, kind: str, exchange: dict[str, str]) -> Condition:
    if isinstance(condition, Ground):  # its colours are others than those of objects
        return condition
    if isinstance(condition, There):
        return condition._replace(things=tuple(_thing(thing, kind, exchange) for thing in condition.things))
    return condition._replace(thing=_thing(condition.thing, kind, exchange))


def _thing(thing: Description, kind: str, exchange: dict[str, str]) -> Description:
    if kind == "colour":
        return thing._replace(colour=exchange.get(thing.colour, thing.colour))
    return thing._replace(shape=exchange.get(thing.shape, thing.shape))


def _named(claim: Claim, kind: str) -> set[str]:
    """The colours, or shapes, that a claim names."""
    things = [thing for condition in claim for thing in _things(condition)]
    return {thing.colour if kind == "colour" else thing.shape for thing in things} - {""}


def _things(condition: Condition) -> tuple[Description, ...]:
    if isinstance(condition, There):
        return condition.things
    return (condition.thing,) if isinstance(condition, Number | Extreme | Share) else ()

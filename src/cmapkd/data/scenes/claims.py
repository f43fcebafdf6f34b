"""What a caption asserts, in a form that can be checked on any scene."""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

from cmapkd.data.scenes.world import Scene, SceneObject


class Description(NamedTuple):
    """What is said of an object; empty where nothing is said. `column` and `row` are those of `SceneObject`."""

    colour: str = ""
    shape: str = ""
    texture: str = ""
    size: str = ""
    column: str = ""
    row: str = ""


class There(NamedTuple):
    """There are different objects, one for each description, with (relation, first, second) between them."""

    things: tuple[Description, ...]
    relations: tuple[tuple[str, int, int], ...] = ()


class Number(NamedTuple):
    """Exactly `number` objects fit the description; the empty description counts all."""

    thing: Description
    number: int


class Ground(NamedTuple):
    """The background has this colour and texture; an empty one is not said."""

    colour: str = ""
    texture: str = ""


class Extreme(NamedTuple):
    """The one object of the `largest` or `smallest` size fits the description."""

    which: str
    thing: Description


class Share(NamedTuple):
    """`all` objects (of two or more), or `most` (over half, of three or more), fit the description."""

    share: str
    thing: Description


Condition = There | Number | Ground | Extreme | Share
Claim = tuple[Condition, ...]
"""Conditions that all hold."""

_SIZES = ("small", "medium", "large")


def fits(thing: SceneObject, description: Description) -> bool:
    """True when everything said is so."""
    colour, shape, texture, size, column, row = description
    return (
        (not colour or colour == thing.colour)
        and (not shape or shape == thing.shape)
        and (not texture or texture == thing.texture)
        and (not size or size == thing.size)
        and (not column or column == thing.column)
        and (not row or row == thing.row)
    )


def side(first: SceneObject, second: SceneObject) -> str:
    """Where the first object's centre lies seen from the second's: left, right, above, below or, in doubt, empty."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > 0.12 and abs(dx) > 1.2 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > 0.12 and abs(dy) > 1.2 * abs(dx):
        return "above" if dy < 0 else "below"
    return ""


def related(scene: Scene, relation: str, first: int, second: int) -> bool:
    """True when object `first` is left, right, above, below of, or overlaps, or covers part of, object `second`."""
    if relation == "covers":
        return (second, first) in scene.overlaps
    if relation == "overlaps":
        return (second, first) in scene.overlaps or (first, second) in scene.overlaps
    return side(scene.objects[first], scene.objects[second]) == relation


def smallest(scene: Scene) -> SceneObject | None:
    """The one object of the smallest size; None where several share it, or there is one object only."""
    sizes = [_SIZES.index(thing.size) for thing in scene.objects]
    least = min(sizes)
    return scene.objects[sizes.index(least)] if len(sizes) > 1 and sizes.count(least) == 1 else None


def holds(claim: Claim, scene: Scene) -> bool:
    """True when every condition of the claim is so in the scene."""
    return all(_holds(condition, scene) for condition in claim)


def _holds(condition: Condition, scene: Scene) -> bool:
    things = scene.objects
    if isinstance(condition, Ground):
        return condition.colour in ("", scene.background.colour) and condition.texture in ("", scene.background.texture)
    if isinstance(condition, There):
        return _there(condition, scene)
    if isinstance(condition, Extreme):
        thing = things[0] if condition.which == "largest" else smallest(scene)
        return thing is not None and fits(thing, condition.thing)
    number = sum(fits(thing, condition.thing) for thing in things)
    if isinstance(condition, Number):
        return number == condition.number
    if condition.share == "all":
        return len(things) > 1 and number == len(things)
    return len(things) > 2 and 2 * number > len(things)


def _there(condition: There, scene: Scene) -> bool:
    wanted = condition.things
    candidates = [{place for place, thing in enumerate(scene.objects) if fits(thing, want)} for want in wanted]
    if not all(candidates):
        return False
    return any(
        all(place in fitting for place, fitting in zip(places, candidates, strict=True))
        and all(
            related(scene, relation, places[first], places[second]) for relation, first, second in condition.relations
        )
        for places in permutations(range(len(scene.objects)), len(wanted))
    )

"""Questions about a scene with their answers."""

from __future__ import annotations

from itertools import permutations
from types import MappingProxyType

from cmapkd.data.scenes.claims import Description, fits, side
from cmapkd.data.scenes.draws import Draws, key_of
from cmapkd.data.scenes.spec import COLOURS, DIFFICULTIES, HELD_OUT, SHAPES
from cmapkd.data.scenes.words import NUMBERS, SYNONYMS, plural
from cmapkd.data.scenes.world import Scene
from cmapkd.data.types import QuestionAnswer

_OPPOSITE = MappingProxyType({"left": "right", "right": "left", "above": "below", "below": "above"})
_SIDES = MappingProxyType({"left": "left of", "right": "right of", "above": "above", "below": "below"})


def questions_of(scene: Scene) -> tuple[QuestionAnswer, ...]:
    """Six or seven questions, each with every answer that is right.

    Two ask whether something exists, with yes and no equally likely; the wrong ones recombine what is there, where
    they can. The seventh, a relation, needs two objects that are clearly beside or above each other.
    """
    draws = Draws(key_of(scene.key, "questions"))
    asked = [
        *_existence(draws, scene),
        _count(draws, scene),
        _total(scene) if draws.chance(0.5) else _count_colour(draws, scene),
        _largest(draws, scene),
        _background(scene) if draws.chance(0.5) else _colour(draws, scene),
    ]
    relation = _relation(draws, scene)
    return tuple(asked if relation is None else [*asked, relation])


def _existence(draws: Draws, scene: Scene) -> list[QuestionAnswer]:
    """Two different questions `Is there a red circle?`."""
    there = sorted({(thing.colour, thing.shape) for thing in scene.objects})
    asked: dict[tuple[str, str], str] = {}
    while len(asked) < 2:
        if draws.chance(0.5):
            asked[draws.pick(there)] = "yes"
        else:
            asked[_absent(draws, there)] = "no"
        if len(there) == 1 and len(asked) == 1 and "yes" in asked.values():  # nothing else to say yes to
            asked[_absent(draws, there)] = "no"
    return [
        QuestionAnswer(f"Is there {_a(f'{colour} {shape}')}?", (answer,), "yes/no", category="existence")
        for (colour, shape), answer in asked.items()
    ]


def _absent(draws: Draws, there: list[tuple[str, str]]) -> tuple[str, str]:
    """A pair that is not there: of a colour and a shape that are, where that is possible."""
    usual = not any(pair in HELD_OUT for pair in there)  # train must not teach that some pairs never are
    swapped = [(colour, shape) for colour, _ in there for _, shape in there]
    for pairs in (swapped, [(colour, draws.pick(SHAPES)) for colour, _ in there]):
        absent = [pair for pair in pairs if pair not in there and not (usual and pair in HELD_OUT)]
        if absent:
            return draws.pick(absent)
    while True:
        pair = draws.pick(tuple(COLOURS)), draws.pick(SHAPES)
        if pair not in there and not (usual and pair in HELD_OUT):
            return pair


def _count(draws: Draws, scene: Scene) -> QuestionAnswer:
    shape = draws.pick(SHAPES) if draws.chance(0.15) else draws.pick(scene.objects).shape
    return _number(f"How many {plural(shape)} are there?", scene, Description(shape=shape))


def _count_colour(draws: Draws, scene: Scene) -> QuestionAnswer:
    colour = draws.pick(tuple(COLOURS)) if draws.chance(0.15) else draws.pick(scene.objects).colour
    return _number(f"How many {colour} objects are there?", scene, Description(colour=colour))


def _total(scene: Scene) -> QuestionAnswer:
    return _number("How many objects are there?", scene, Description())


def _number(question: str, scene: Scene, wanted: Description) -> QuestionAnswer:
    number = sum(fits(thing, wanted) for thing in scene.objects)
    return QuestionAnswer(question, (str(number), NUMBERS[number]), "number")


def _largest(draws: Draws, scene: Scene) -> QuestionAnswer:
    largest = scene.objects[0]
    if len(DIFFICULTIES[scene.difficulty].textures) > 1 and draws.chance(0.4):
        return QuestionAnswer("What is the texture of the largest object?", _accepted(largest.texture))
    return QuestionAnswer("What is the shape of the largest object?", _accepted(largest.shape))


def _colour(draws: Draws, scene: Scene) -> QuestionAnswer:
    """The colour of a shape that occurs once, or of the largest object where none does."""
    shapes = [thing.shape for thing in scene.objects]
    single = [thing for thing in scene.objects if shapes.count(thing.shape) == 1]
    if not single:
        return QuestionAnswer("What colour is the largest object?", _accepted(scene.objects[0].colour))
    thing = draws.pick(single)
    return QuestionAnswer(f"What colour is the {thing.shape}?", _accepted(thing.colour))


def _background(scene: Scene) -> QuestionAnswer:
    return QuestionAnswer("What colour is the background?", (scene.background.colour,))


def _relation(draws: Draws, scene: Scene) -> QuestionAnswer | None:
    """`Is the red circle left of the blue square?`, of two names that occur once; no means the opposite side."""
    names = [thing.name for thing in scene.objects]
    single = [thing for thing in scene.objects if names.count(thing.name) == 1]
    for first, second in draws.some(list(permutations(single, 2)), 6):
        where = side(first, second)
        if where:
            right = draws.chance(0.5)
            asked = _SIDES[where if right else _OPPOSITE[where]]
            answer = "yes" if right else "no"
            question = f"Is the {first.name} {asked} the {second.name}?"
            return QuestionAnswer(question, (answer,), "yes/no", category="relation")
    return None


def _accepted(name: str) -> tuple[str, ...]:
    return SYNONYMS.get(name, (name,))


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

"""Five true captions of a scene, each with the claim that it makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from cmapkd.data.scenes.claims import (
    Claim,
    Condition,
    Description,
    Extreme,
    Ground,
    Number,
    Share,
    There,
    side,
    smallest,
)
from cmapkd.data.scenes.draws import Draws, key_of
from cmapkd.data.scenes.spec import DIFFICULTIES
from cmapkd.data.scenes.words import NUMBERS, listing, noun_phrase, place_phrase, plural, synonym
from cmapkd.data.scenes.world import Scene, SceneObject

NUM_CAPTIONS = 5
LEAST_WORDS, MOST_WORDS = 4, 25

TEMPLATES = (
    "the {} is the largest object",
    "the {} is the biggest object",
    "a picture with the {} as its largest object",
    "the largest object is the {}",
)
"""Zero-shot prompts for a class name, in wordings that captions use too."""

_RELATIONS = {
    "left": ("{a} is left of {b}", "{a} is to the left of {b}", "{b} has {a} on its left", "left of {b} is {a}"),
    "right": ("{a} is right of {b}", "{a} is to the right of {b}", "{b} has {a} on its right", "right of {b} is {a}"),
    "above": ("{a} is above {b}", "{a} above {b}", "above {b} there is {a}", "{b} has {a} above it"),
    "below": ("{a} is below {b}", "{a} under {b}", "below {b} there is {a}", "{b} has {a} below it"),
    "overlaps": ("{a} overlaps {b}", "{a} and {b} overlap", "{a} overlapping {b}"),
    "covers": ("{a} partly covers {b}", "{a} is in front of {b}", "{b} is partly behind {a}"),
}
_SHORT_RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


class _Core(NamedTuple):
    """What a caption is about, before more details are added; `bits` is roughly how much it tells."""

    text: str
    claim: Claim
    bits: float


def captions_with_claims(scene: Scene) -> tuple[tuple[str, Claim], ...]:
    """Five captions of different kinds in random order; every claim holds in the scene.

    Each goes on adding details (background, number of objects, the largest one) until it tells about as many bits as
    the spec's `details` asks for, except for the few that its `coarse` leaves general.
    """
    return _Speaker(scene).captions()


class _Speaker:
    """Says things of one scene, with the draws that are the scene's own."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.spec = DIFFICULTIES[scene.difficulty]
        self.textured = len(self.spec.textures) > 1  # otherwise a texture is not worth a word
        self.tails = ((Ground, self._ground_tail), (Number, self._total_tail), (Extreme, self._largest_tail))
        self.draws = Draws(key_of(scene.key, "captions"))

    def captions(self) -> tuple[tuple[str, Claim], ...]:
        kinds: list[Callable[[], _Core]]
        if len(self.scene.objects) == 1:
            kinds = [self._detail, self._detail, self._extreme, self._extreme, self._summary]
        else:
            fourth = self.draws.pick((self._counting, self._summary))
            fifth = self.draws.pick((self._extreme, self._relation))
            kinds = [self._detail, self._binding, self._relation, fourth, fifth]
        captions: list[tuple[str, Claim]] = []
        texts: set[str] = set()
        for kind in self.draws.some(kinds, NUM_CAPTIONS):
            caption = self._finished(kind())
            while not LEAST_WORDS <= caption[0].count(" ") + 1 <= MOST_WORDS or caption[0] in texts:
                caption = self._finished(kind())
            texts.add(caption[0])
            captions.append(caption)
        return tuple(captions)

    def _finished(self, core: _Core) -> tuple[str, Claim]:
        text, claim, bits = core
        wanted = 4.0 if self.draws.chance(self.spec.coarse) else self.spec.details
        if bits < wanted:
            said = {type(condition) for condition in claim}
            tails = [(kind, tail) for kind, tail in self.tails if kind not in said]
            for _, tail in self.draws.some(tails, len(tails)):
                more, condition, gain = tail()
                if text.count(" ") + more.count(" ") < MOST_WORDS:
                    text, claim, bits = text + more, (*claim, condition), bits + gain
                if bits >= wanted:
                    break
        return text, claim

    def _ground_tail(self) -> tuple[str, Condition, float]:
        ground = Ground(self.scene.background.colour, self.scene.background.texture)
        return (
            f" {self.draws.pick(('on', 'on', 'against'))} a {self._ground(ground)}",
            ground,
            4.5 if len(self.spec.background_textures) > 1 else 3.0,
        )

    def _total_tail(self) -> tuple[str, Condition, float]:
        number = len(self.scene.objects)
        objects = f"{NUMBERS[number]} {'object' if number == 1 else 'objects'}"
        text = self.draws.pick((f", {objects} in total", f" in a scene of {objects}"))
        return text, Number(Description(), number), 1.8

    def _largest_tail(self) -> tuple[str, Condition, float]:
        thing = self._about(self.scene.objects[0], texture=0.2, place=0.3)
        word, phrase = self.draws.pick(("largest", "biggest")), noun_phrase(self.draws, thing)
        text = f", the {word} object is {phrase}{place_phrase(self.draws, thing)}"
        return text, Extreme("largest", thing), _bits(thing)

    def _detail(self) -> _Core:
        """One object with nearly everything that can be said of it."""
        thing = self._about(self.draws.pick(self.scene.objects), texture=0.95, size=0.9, place=0.9)
        phrase, place = noun_phrase(self.draws, thing), place_phrase(self.draws, thing)
        text = self.draws.pick((f"{phrase}{place}", f"there is {phrase}{place}", f"a picture showing {phrase}{place}"))
        return _Core(text, (There((thing,)),), _bits(thing) - 1.5)

    def _binding(self) -> _Core:
        """Two or three objects, each with its own attributes."""
        number = 3 if len(self.scene.objects) > 2 and self.draws.chance(0.5) else 2
        share = 0.8 if number == 2 else 0.5
        chosen = self.draws.some(self.scene.objects, number)
        things = [self._about(thing, texture=share, size=share / 2) for thing in chosen]
        phrases = listing([noun_phrase(self.draws, thing) for thing in things])
        text = self.draws.pick((phrases, f"there are {phrases}", f"a picture of {phrases}", f"an image with {phrases}"))
        if text.startswith("there are") and number == 2:
            text = f"both {phrases}"
        return _Core(text, (There(tuple(things)),), _bits(*things) - 3.0)

    def _relation(self) -> _Core:
        """Where two or three objects are to each other."""
        chosen = self._related_pair()
        if chosen is None:
            return self._binding()
        relation, first, second = chosen
        objects = self.scene.objects
        things = [self._about(objects[place], texture=0.5, size=0.3) for place in (first, second)]
        relations = [(relation, 0, 1)]
        phrases = [noun_phrase(self.draws, thing) for thing in things]
        text = self.draws.pick(_RELATIONS[relation]).format(a=phrases[0], b=phrases[1])
        if len(objects) > 2 and text.startswith(phrases[0] + " is ") and self.draws.chance(0.6):
            third = self.draws.pick([place for place in range(len(objects)) if place not in (first, second)])
            where = side(objects[first], objects[third])
            if where:
                things.append(self._about(objects[third], texture=0.3, size=0.2))
                relations.append((where, 0, 2))
                text += f" and {_SHORT_RELATIONS[where]} {noun_phrase(self.draws, things[2])}"
        return _Core(text, (There(tuple(things), tuple(relations)),), _bits(*things) - 3.0 + 1.5 * len(relations))

    def _related_pair(self) -> tuple[str, int, int] | None:
        """A relation that holds, with its two objects; half of the time of an overlap, where there are any."""
        if self.scene.overlaps and self.draws.chance(0.5):
            back, front = self.draws.pick(self.scene.overlaps)
            return (self.draws.pick(("covers", "covers", "overlaps")), front, back)
        places = tuple(range(len(self.scene.objects)))
        for _ in range(6):
            first, second = self.draws.some(places, 2)
            where = side(self.scene.objects[first], self.scene.objects[second])
            if where:
                return where, first, second
        return None

    def _counting(self) -> _Core:
        """How many objects there are of each shape, colour, texture or size."""
        attributes = ("shape", "shape", "shape", "colour", "colour", "both", "both", "texture")
        attribute = self.draws.pick(attributes if self.textured else attributes[:-1])
        groups: Counter[Description] = Counter()
        for thing in self.scene.objects:
            groups[_only(thing, attribute)] += 1
        said = self.draws.some(sorted(groups.items()), 3)
        counts = [f"{NUMBERS[number]} {noun_phrase(self.draws, thing, '', number=number)}" for thing, number in said]
        listed = listing(counts)
        there = f"there {_are(said[0][1])} {listed}"
        text = self.draws.pick((f"exactly {listed}", f"a picture of {listed}", there, f"{listed} in view"))
        conditions = tuple(Number(thing, number) for thing, number in said)
        return _Core(text, conditions, _bits(*[thing for thing, _ in said]) + 0.7 * len(said))

    def _summary(self) -> _Core:
        """The whole picture: background, number of objects, what most of them have in common."""
        ground = Ground(self.scene.background.colour, self.scene.background.texture)
        number = len(self.scene.objects)
        objects = f"{NUMBERS[number]} {'object' if number == 1 else 'objects'}"
        claim: Claim = (ground, Number(Description(), number))
        backdrop, bits, common = self._ground(ground), 6.0, ""
        share = self._share()
        if share is not None and self.draws.chance(0.8):
            claim, bits = (*claim, share), bits + _bits(share.thing) / 1.5
            thing = share.thing
            word = synonym(self.draws, thing.shape or thing.colour or thing.texture)
            alike = plural(word) if thing.shape else word
            common = f", {share.share} of them {alike}"
        text = self.draws.pick(
            (
                f"{objects} on a {backdrop}{common}",
                f"a {backdrop} with {objects}{common}",
                f"a picture of {objects}{common}, on a {backdrop}",
                f"there {_are(number)} {objects}{common}, on a {backdrop}",
            )
        )
        return _Core(text, claim, bits)

    def _extreme(self) -> _Core:
        """The largest object, with its place, its neighbour or the smallest one."""
        largest, word = self.scene.objects[0], self.draws.pick(("largest", "largest", "biggest"))
        thing = self._about(largest, texture=0.5, place=0.35 if len(self.scene.objects) > 1 else 0.9)
        phrase, place = noun_phrase(self.draws, thing, ""), place_phrase(self.draws, thing)
        a_phrase = f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"
        if place:
            texts = (f"the {word} object, {a_phrase}, is{place}", f"the {phrase}{place} is the {word} object")
            text = self.draws.pick(texts)
        else:
            text = self.draws.pick(
                (
                    f"the {word} object is {a_phrase}",
                    f"the {word} object is the {phrase}",
                    f"the {phrase} is the {word} object",
                    f"a picture with the {phrase} as its {word} object",
                    f"a picture whose {word} object is {a_phrase}",
                )
            )
        claim: Claim = (Extreme("largest", thing),)
        bits = _bits(thing)
        least = smallest(self.scene)
        if least is not None and self.draws.chance(0.7):
            other = self._about(least, texture=0.4)
            text += f" and the smallest is {noun_phrase(self.draws, other)}"
            claim, bits = (*claim, Extreme("smallest", other)), bits + _bits(other)
        return _Core(text, claim, bits)

    def _about(self, thing: SceneObject, *, texture: float = 0.0, size: float = 0.0, place: float = 0.0) -> Description:
        """Colour and shape and, with these probabilities, more."""
        uniform = self.draws.uniform
        column = row = ""
        if place and uniform() < place:
            column, row = thing.column, thing.row
            if "center" in (column, row) and column != row:  # only the very center has a phrase
                column, row = column.replace("center", ""), row.replace("center", "")
        said_texture = thing.texture if self.textured and texture and uniform() < texture else ""
        said_size = thing.size if size and uniform() < size else ""
        return Description(thing.colour, thing.shape, said_texture, said_size, column, row)

    def _share(self) -> Share | None:
        """An attribute that all, or most, objects have."""
        number = len(self.scene.objects)
        for attribute in self.draws.some(("shape", "colour", "texture") if self.textured else ("shape", "colour"), 3):
            thing, count = Counter(_only(one, attribute) for one in self.scene.objects).most_common(1)[0]
            if count == number > 1:
                return Share("all", thing)
            if number > 2 and 2 * count > number:
                return Share("most", thing)
        return None

    def _ground(self, ground: Ground) -> str:
        word = self.draws.pick(("background", "background", "backdrop"))
        return f"{synonym(self.draws, ground.texture)} {ground.colour} {word}"


def _only(thing: SceneObject, attribute: str) -> Description:
    if attribute == "shape":
        return Description(shape=thing.shape)
    if attribute == "colour":
        return Description(colour=thing.colour)
    if attribute == "texture":
        return Description(texture=thing.texture)
    return Description(thing.colour, thing.shape)


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _bits(*things: Description) -> float:
    """Roughly how much descriptions tell: a colour or shape said before, as a theme would repeat it, tells less."""
    bits = 0.0
    for colour, shape, texture, size, column, row in things:
        bits += (3.3 if colour else 0.0) + (3.3 if shape else 0.0) + (2.0 if texture else 0.0)
        bits += (1.0 if size else 0.0) + (1.3 if column else 0.0) + (1.3 if row else 0.0)
    if len(things) > 1:
        for words in ([thing[0] for thing in things if thing[0]], [thing[1] for thing in things if thing[1]]):
            bits -= 2.0 * (len(words) - len(set(words)))
    return bits

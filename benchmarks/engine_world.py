"""What the built-in world knows of questions, facts and programs of `cmapkd engine`, whose models never read it.

    python benchmarks/engine_world.py fm2ds_scenes "data=scenes@test?start=21000&length=300" --out runs/hops

writes what a packaged recipe with programs would write if its tools were always right: a test of what it teaches.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cmapkd.data.scenes.source import boxes_of
from cmapkd.data.scenes.words import SYNONYMS, plural
from cmapkd.data.scenes.world import Scene
from cmapkd.engine import Engine, EngineConfig, load_engine
from cmapkd.engine.candidates import Candidate, Corners
from cmapkd.engine.programs import programs
from cmapkd.engine.written import Panel
from cmapkd.evaluation.vqa import normalise_answer, vqa_accuracy

Truth = Callable[[Candidate], bool]


def means(name: str, answer: str | None) -> bool:
    """Whether an answer is a word for what something is."""
    return normalise_answer(answer or "") in SYNONYMS.get(name, (name,))


def answer_is_right(candidate: Candidate) -> bool:
    """Of a question of the data, by all answers that the world accepts."""
    accepted = next(each.answers for each in candidate.sample.questions if each.question == candidate.question)
    return vqa_accuracy(candidate.answer or "", accepted) == 1


def fact_is_true(candidate: Candidate) -> bool:
    """Of a fact about the largest object, or the background."""
    scene = scene_of(candidate)
    if candidate.relation == "background":
        return means(scene.background.colour, candidate.answer)
    return means(getattr(scene.objects[0], str(candidate.relation)), candidate.answer)


def region_is_described(candidate: Candidate) -> bool:
    """Of the object in the region, which is the largest of its crop."""
    assert candidate.box is not None
    return means(_in_region(scene_of(candidate), candidate.box, candidate.question), candidate.answer)


def scene_of(candidate: Candidate) -> Scene:
    """What its picture shows."""
    sample: Any = candidate.sample
    scene: Scene = sample.scene
    return scene


def _in_region(scene: Scene, region: Corners, question: str) -> str:
    """The shape, texture or colour of the object in a region, whichever is asked for."""
    corners = [(box.x, box.y, box.x + box.width, box.y + box.height) for box in boxes_of(scene, 64)]
    thing = scene.objects[corners.index(region)]
    return str(getattr(thing, next(kind for kind in ("shape", "texture", "colour") if kind in question)))


def says(candidate: Candidate) -> str:
    """The right answer to whatever programs of the packaged recipes ask; empty where nothing is right.

    Raises:
        ValueError: the world does not know the question.
    """
    scene, question = scene_of(candidate), candidate.question
    if candidate.box is not None:
        return _in_region(scene, candidate.box, question)
    for asked in candidate.sample.questions:
        if asked.question == question:
            return asked.answers[0]
    if found := re.fullmatch(r"What (?:colour is|is the (shape|texture) of) the largest object\?", question):
        return str(getattr(scene.objects[0], found[1] or "colour"))
    if question == "What colour is the background?":
        return scene.background.colour
    if found := re.fullmatch(r"What colour is the (\w+)\?", question):
        return next((thing.colour for thing in scene.objects if thing.shape == found[1]), "")
    if found := re.fullmatch(r"How many (\w+) objects are there\?", question):
        return str(sum(thing.colour == found[1] for thing in scene.objects))
    if found := re.fullmatch(r"How many (\w+) are there\?", question):
        return str(sum(plural(thing.shape) == found[1] for thing in scene.objects))
    raise ValueError(f"the world does not know: {question}")


class World(Panel):
    """Tools that are always right."""

    def drafts(self, candidates: Sequence[Candidate], *_: Any, number: int = 1, **__: Any) -> list[list[str]]:
        return [[says(each)] * number for each in candidates]


def by_the_world(config: EngineConfig, candidate: Candidate) -> Candidate:
    """The same way to the same question, with tools that are always right."""
    assert config.propose.programs is not None
    found = programs([(candidate.index, candidate.sample)], config.propose.programs, World({}, torch.device("cpu")))
    return next(each for each in found if (each.question, each.way) == (candidate.question, candidate.way))


def rationale_is_true(config: EngineConfig) -> Truth:
    """Whether every step that a rationale tells is true: regions as the world has them, or any object of a shape."""

    def true(candidate: Candidate) -> bool:
        if found := re.fullmatch(r"The (\w+) is (\w+)\.", candidate.rationale or ""):
            return any((thing.shape, thing.colour) == found.groups() for thing in scene_of(candidate).objects)
        return candidate.rationale == by_the_world(config, candidate).rationale

    return true


def composed_is_right(config: EngineConfig) -> Truth:
    """Of a question that the data do not ask: the answer of a program with tools that are always right."""

    def right(candidate: Candidate) -> bool:
        return normalise_answer(candidate.answer or "") == normalise_answer(
            by_the_world(config, candidate).answer or ""
        )

    return right


def main(recipe: str, overrides: Sequence[str], out: str) -> None:
    engine = Engine(load_engine(recipe, [*overrides, "seed=-1"]))  # so that the models never go on in its folder
    engine.panel = World(engine.panel.models, engine.panel.device)
    print(engine.run(out).counts)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:-2], sys.argv[-1])

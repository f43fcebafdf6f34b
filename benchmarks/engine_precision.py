"""How many answers are right before and after the filters of `cmapkd engine`, by what the built-in world knows.

    python benchmarks/engine_precision.py docs/results/engine_precision.json

The large and the small models are those of the packaged recipes: the small ones are untrained. One core, 5 minutes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cmapkd.data.scenes.source import boxes_of
from cmapkd.data.scenes.words import SYNONYMS
from cmapkd.data.scenes.world import Scene
from cmapkd.engine import Engine, load_engine
from cmapkd.engine.candidates import Candidate
from cmapkd.evaluation.vqa import normalise_answer, vqa_accuracy

SCENES = 48


def means(name: str, answer: str | None) -> bool:
    """Whether an answer is a word for what something is."""
    return normalise_answer(answer or "") in SYNONYMS.get(name, (name,))


def answer_is_right(candidate: Candidate) -> bool:
    """Of a question of the data, by all answers that the world accepts."""
    asked = candidate.sample.questions[candidate.number]
    return vqa_accuracy(candidate.answer or "", asked.answers) == 1


def fact_is_true(candidate: Candidate) -> bool:
    """Of a fact about the largest object, or the background."""
    scene = _scene(candidate)
    if candidate.relation == "background":
        return means(scene.background.colour, candidate.answer)
    return means(getattr(scene.objects[0], str(candidate.relation)), candidate.answer)


def region_is_described(candidate: Candidate) -> bool:
    """Of the object in the region, which is the largest of its crop."""
    scene = _scene(candidate)
    corners = [(box.x, box.y, box.x + box.width, box.y + box.height) for box in boxes_of(scene, 64)]
    thing = scene.objects[corners.index(candidate.box)]
    kind = next(kind for kind in ("shape", "texture", "colour") if kind in candidate.question)
    return means(getattr(thing, kind), candidate.answer)


def _scene(candidate: Candidate) -> Scene:
    sample: Any = candidate.sample
    scene: Scene = sample.scene
    return scene


TRUTHS: dict[str, Callable[[Candidate], bool]] = {
    "mpa_scenes": answer_is_right,
    "symbolic_kd_scenes": fact_is_true,
    "zoom_without_zoom_scenes": region_is_described,
}


def precision(candidates: Iterable[Candidate], truth: Callable[[Candidate], bool]) -> dict[str, float]:
    """Number of candidates, and the share of them, in per cent, that are true."""
    right = [truth(each) for each in candidates]
    return {"number": len(right), "right": 100 * sum(right) / max(1, len(right))}


def measure(name: str, *overrides: str) -> dict[str, Any]:
    """One recipe on its own pictures: all answers, those that each filter leaves, and those that are kept."""
    config = load_engine(name, [f"data={load_engine(name).data.partition('&')[0]}&length={SCENES}", *overrides])
    engine = Engine(config)
    made = [each for shard in range(engine.num_shards) for each in engine.make(shard)[0] if each.answer]
    found = {"all": precision(made, TRUTHS[name])}
    for place, label in enumerate(config.labels):
        left = [each for each in made if each.dropped not in config.labels[: place + 1]]
        found[label] = precision(left, TRUTHS[name])
    return found


def main(out: Path) -> None:
    values = {name: measure(name) for name in TRUTHS}
    boxed = measure("zoom_without_zoom_scenes", "answers.on_crop.sees=boxed")
    values["zoom_without_zoom_scenes, boxed"] = boxed
    what = f"{SCENES} training pictures of each packaged recipe, seed 0; right: per cent by the world"
    out.write_text(json.dumps({"what": what, **values}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""How many answers are right before and after the filters of `cmapkd engine`, by what the built-in world knows.

    python benchmarks/engine_precision.py docs/results/engine_precision.json

The large and the small models are those of the packaged recipes: the small ones are untrained. One core, 5 minutes.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cmapkd.data.scenes.source import boxes_of
from cmapkd.data.scenes.words import SYNONYMS
from cmapkd.data.scenes.world import Scene
from cmapkd.engine import Engine, load_engine
from cmapkd.engine.candidates import Candidate
from cmapkd.engine.run import load_models
from cmapkd.evaluation.vqa import normalise_answer, vqa_accuracy
from cmapkd.models import Model

SCENES = 48
BOXED = ("answers.on_crop.sees=boxed", "answers.on_crop.margin=0")


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


def chance(made: list[Candidate], kept: list[Candidate], truth: Callable[[Candidate], bool]) -> float:
    """The share, in per cent, that is true of as many random candidates of each relation as are kept."""
    number = Counter(each.relation for each in kept)
    right = {name: precision([each for each in made if each.relation == name], truth)["right"] for name in number}
    return sum(right[name] * many for name, many in number.items()) / max(1, len(kept))


def measure(name: str, *overrides: str, damage: float | None = None) -> dict[str, Any]:
    """One recipe on its own pictures: all answers, those that each filter leaves, and those that are kept.

    Args:
        damage: the small model is the large one with so much noise in its matrices; None: the recipe's, untrained.
    """
    config = load_engine(name, [f"data={load_engine(name).data.partition('&')[0]}&length={SCENES}", *overrides])
    models = load_models(config)
    if damage is not None:
        models["small"] = damaged(models["large"], damage)
    engine = Engine(config, models=models)
    made = [each for shard in range(engine.num_shards) for each in engine.make(shard)[0] if each.answer]
    kept = [each for each in made if each.dropped is None]
    found: dict[str, Any] = {"all": precision(made, TRUTHS[name]), "kept": precision(kept, TRUTHS[name])}
    found["random"] = {"number": len(kept), "right": chance(made, kept, TRUTHS[name])}
    for relation in dict.fromkeys(str(each.relation) for each in made if each.relation is not None):
        parts = {
            what: [each for each in some if each.relation == relation] for what, some in (("all", made), ("kept", kept))
        }
        found.setdefault("relations", {})[relation] = {
            what: precision(part, TRUTHS[name]) for what, part in parts.items()
        }
    for place, label in enumerate(config.labels):
        left = [each for each in made if each.dropped not in config.labels[: place + 1]]
        found[label] = precision(left, TRUTHS[name])
    if damage is not None:
        said = [replace(each, answer=each.answers["small"][0]) for each in made]
        found["small model"] = precision(said, TRUTHS[name])
    return found


def damaged(model: Model, amount: float) -> Model:
    """A copy whose every matrix has noise of this share of its own spread: right less often, and wrong as it is."""
    copied = copy.deepcopy(model)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=draws)
                parameter.add_(amount * parameter.std() * noise)
    return copied


def main(out: Path) -> None:
    values = {name: measure(name) for name in TRUTHS}
    values["mpa_scenes, related"] = measure("mpa_scenes", damage=0.3)
    values["zoom_without_zoom_scenes, boxed"] = measure("zoom_without_zoom_scenes", *BOXED)
    what = f"{SCENES} training pictures of each packaged recipe, seed 0; right: per cent by the world"
    out.write_text(json.dumps({"what": what, **values}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""How many answers are right before and after the filters of `cmapkd engine`, by what the built-in world knows.

    python benchmarks/engine_precision.py docs/results/engine_precision.json [ROW ...]

The large and the small models are those of the packaged recipes: the small ones are untrained. One core, 8 minutes.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import engine_world as world
from cmapkd.engine import Engine, EngineConfig, load_engine
from cmapkd.engine.candidates import Candidate
from cmapkd.engine.run import load_models
from cmapkd.models import Model

SCENES = 48
BOXED = ("answers.on_crop.sees=boxed", "answers.on_crop.margin=0")


TRUTHS: dict[str, Callable[[EngineConfig], world.Truth]] = {
    "mpa_scenes": lambda _: world.answer_is_right,
    "symbolic_kd_scenes": lambda _: world.fact_is_true,
    "zoom_without_zoom_scenes": lambda _: world.region_is_described,
    "vpd_scenes": world.rationale_is_true,
    "sdrt_multi_prompt_scenes": lambda _: world.answer_is_right,
    "fm2ds_scenes": world.composed_is_right,
    "lskd_scenes": lambda _: world.region_is_described,
    "tail_vrdu_scenes": world.composed_is_right,
}
"""Of each packaged recipe what is true of a candidate."""


def precision(candidates: Iterable[Candidate], truth: world.Truth) -> dict[str, float]:
    """Number of candidates, and the share of them, in per cent, that are true."""
    right = [truth(each) for each in candidates]
    return {"number": len(right), "right": 100 * sum(right) / max(1, len(right))}


def chance(made: list[Candidate], kept: list[Candidate], truth: world.Truth, *, one: bool = False) -> float:
    """The share, in per cent, that is true of as many random candidates of each relation as are kept.

    Args:
        one: of each question one candidate at most is drawn, so that each question counts once.
    """
    number = Counter(each.relation for each in kept)
    ways = Counter((each.index, each.question) for each in made)
    total, right = defaultdict[str | None, float](float), defaultdict[str | None, float](float)
    for each in made:
        weight = 1 / ways[each.index, each.question] if one else 1.0
        total[each.relation] += weight
        right[each.relation] += weight * truth(each)
    return sum(100 * right[name] / total[name] * many for name, many in number.items()) / max(1, len(kept))


def measure(
    name: str, *overrides: str, damage: float | None = None, truth: world.Truth | None = None
) -> dict[str, Any]:
    """One recipe on its own pictures: all answers, those that each filter leaves, and those that are kept.

    Args:
        damage: the small model is the large one with so much noise in its matrices; None: the recipe's, untrained.
        truth: what is counted as right; None: that of TRUTHS.
    """
    config = load_engine(name, [f"data={load_engine(name).data.partition('&')[0]}&length={SCENES}", *overrides])
    models = load_models(config)
    if damage is not None:
        models["small"] = damaged(models["large"], damage)
    engine = Engine(config, models=models)
    made = [each for shard in range(engine.num_shards) for each in engine.make(shard)[0] if each.answer]
    found = counted(made, config, truth or TRUTHS[name](config))
    if damage is not None:
        said = [replace(each, answer=each.answers["small"][0]) for each in made]
        found["small model"] = precision(said, world.answer_is_right)
    return found


def counted(made: list[Candidate], config: EngineConfig, truths: world.Truth) -> dict[str, Any]:
    """Numbers and precisions of all candidates that have an answer, by filter and by relation."""
    known = {each.id: truths(each) for each in made}

    def truth(candidate: Candidate) -> bool:
        return known[candidate.id]

    kept = [each for each in made if each.dropped is None]
    found: dict[str, Any] = {"all": precision(made, truth), "kept": precision(kept, truth)}
    by_chance = chance(made, kept, truth, one=config.each is not None)
    found["random"] = {"number": len(kept), "right": by_chance}
    for relation in dict.fromkeys(str(each.relation) for each in made if each.relation is not None):
        parts = {
            what: [each for each in some if each.relation == relation] for what, some in (("all", made), ("kept", kept))
        }
        found.setdefault("relations", {})[relation] = {what: precision(part, truth) for what, part in parts.items()}
    for place, label in enumerate(config.labels):
        left = [each for each in made if each.dropped not in config.labels[: place + 1]]
        found[label] = precision(left, truth)
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


def main(out: Path, names: Sequence[str]) -> None:
    """Measures the rows of these names, or all; rows that are there already stay."""
    values: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() and names else {}
    rows: dict[str, Callable[[], dict[str, Any]]] = {name: partial(measure, name) for name in TRUTHS}
    rows["mpa_scenes, related"] = partial(measure, "mpa_scenes", damage=0.3)
    rows["zoom_without_zoom_scenes, boxed"] = partial(measure, "zoom_without_zoom_scenes", *BOXED)
    rows["vpd_scenes, answers"] = partial(measure, "vpd_scenes", truth=world.answer_is_right)
    values["what"] = f"{SCENES} training pictures of each packaged recipe, seed 0; right: per cent by the world"
    for name in names or rows:
        values[name] = rows[name]()
    out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""The packaged recipes on the built-in world: each filter's precision, by what the world knows and no model read."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmapkd.data.open import open_source
from cmapkd.engine import Engine, list_engine_recipes, load_engine
from cmapkd.engine.candidates import Candidate
from cmapkd.engine.folder import EngineFolder
from writers import make_writer

ROOT = Path(__file__).parents[2]

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "benchmarks")
    precision: Any = importlib.import_module("engine_precision")
    world: Any = importlib.import_module("engine_world")


def share(candidates: list[Candidate], right: Callable[[Candidate], bool]) -> float:
    return sum(map(right, candidates)) / len(candidates)


def test_a_critic_keeps_true_facts() -> None:
    engine = Engine(load_engine("symbolic_kd_scenes", ["data=scenes?start=810000&length=8"]))
    facts = [each for each in engine.make(0)[0] if each.answer]
    kept = [each for each in facts if each.dropped is None]
    assert {each.relation for each in kept} == {"shape", "texture", "colour", "background"}
    assert share(facts, world.fact_is_true) < 0.6
    by_chance = precision.chance(facts, kept, world.fact_is_true) / 100
    assert share(kept, world.fact_is_true) > by_chance + 0.1


def test_a_majority_on_crops_knows_what_the_whole_picture_hides(tmp_path: Path) -> None:
    overrides = ["data=scenes?start=820000&length=4", "answers.on_whole.max_new_tokens=2"]
    engine = Engine(load_engine("zoom_without_zoom_scenes", overrides))
    regions, _ = engine.make(0)
    voted = [each for each in regions if each.scores["majority"] >= 0.75]
    assert len(voted) > 8
    assert share(voted, world.region_is_described) > share(regions, world.region_is_described) + 0.1
    assert share(voted, world.region_is_described) > 0.6
    assert {each.dropped for each in voted} <= {None, "hard"}
    folder = EngineFolder(tmp_path, engine.config.write, engine.config.seed)
    folder.begin()
    folder.finish_shard(0, regions, samples=4)
    made = open_source(f"jsonl:{tmp_path / 'kept.jsonl'}") if folder.join(1) else None
    assert made is not None
    assert len(made) == len([each for each in regions if each.dropped is None])  # each has a picture with a box
    (question,) = made[0].questions
    assert question.question.endswith(
        "?\n\nOnly focus on the objects inside the red bounding box in the image to answer this question."
    )
    assert made[0].image.tobytes() != engine.source[0].image.tobytes()


@pytest.mark.parametrize(
    "name", sorted(precision.TRUTHS.keys() - {"mpa_scenes", "symbolic_kd_scenes", "zoom_without_zoom_scenes"})
)
def test_filters_keep_more_that_is_true_than_chance_of_the_same_kinds(name: str) -> None:
    config = load_engine(name, [f"data={load_engine(name).data.partition('&')[0]}&length=6"])
    made = [each for each in Engine(config).make(0)[0] if each.answer]
    found = precision.counted(made, config, precision.TRUTHS[name](config))
    assert 0 < found["kept"]["number"] < found["all"]["number"]
    assert found["kept"]["right"] > found["random"]["right"] + 2


@pytest.mark.parametrize("name", ["vpd_scenes", "sdrt_multi_prompt_scenes", "fm2ds_scenes", "tail_vrdu_scenes"])
def test_programs_are_right_where_their_tools_are(name: str) -> None:
    config = load_engine(name, [f"data={load_engine(name).data.partition('&')[0]}&length=12"])
    writer = make_writer().float()
    engine = Engine(config, models=dict.fromkeys(config.models, writer))
    engine.panel = world.World(engine.panel.models, engine.panel.device)
    made = engine.make(0)[0]
    kept = [each for each in made if each.dropped is None]
    truth = world.answer_is_right if kept[0].accepted else world.composed_is_right(config)
    assert share(kept, truth) == 1
    assert len(kept) > 0.9 * len({(each.index, each.question) for each in made})
    assert {each.relation for each in kept} == {each.relation for each in made}


@pytest.mark.parametrize("name", list_engine_recipes())
def test_a_packaged_recipe_begins_with_a_comment_and_can_be_read(name: str) -> None:
    config = load_engine(name)
    assert config.write.control  # a comparison with random data of equal count needs it
    assert json.loads(json.dumps(config.model_dump(mode="json")))["data"]

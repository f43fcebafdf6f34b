"""Every comparison of examples/ can be planned, and its sources of the built-in world open as they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from cmapkd.compare import Plan, load_comparison, make_plan
from cmapkd.data.open import open_source

EXAMPLES = Path(__file__).parents[1] / "examples"
NEED_THE_WORLDS = {"selection_ceiling"}  # a plugin of benchmarks/: tests/test_selection_worlds.py
OF_A_BENCHMARK = {"fork_and_merge"}  # a plan of benchmarks/fork_and_merge.py, which its own test reads


def comparisons() -> list[str]:
    found = [path for path in sorted(EXAMPLES.glob("*.yaml")) if "arms" in yaml.safe_load(path.read_text("utf-8"))]
    return [path.stem for path in found if path.stem not in NEED_THE_WORLDS | OF_A_BENCHMARK]


def sources(plan: Plan) -> Iterator[str]:
    for run in plan.runs:
        data = run.config.data
        yield from filter(None, (data.train, data.val, data.test, *(more.source for more in data.more.values())))
        if isinstance(data.held_out, str):
            yield data.held_out
    yield from plan.comparison.evaluate.values()


@pytest.mark.parametrize("name", comparisons())
def test_a_comparison_is_planned_and_its_world_opens(name: str) -> None:
    plan = make_plan(load_comparison(EXAMPLES / f"{name}.yaml"))
    assert plan.runs
    for spec in dict.fromkeys(sources(plan)):
        if spec.startswith("scenes"):
            assert len(open_source(spec)) > 0, spec


OF_ONE_RANGE = (
    {"cmapkd_attribution", "cmapkd_attribution_final"},  # declared before each had its own
    {"cmapkd_default", "cmapkd_places", "cmapkd_rivals"},  # which share runs
)


def fresh_ranges() -> Iterator[tuple[str, range]]:
    for path in sorted(EXAMPLES.glob("*.yaml")):
        lines = [line.partition(" #")[0] for line in path.read_text("utf-8").splitlines() if line[:1] != "#"]
        for start, length in set(re.findall(r"scenes@test\?start=(\d+)&length=(\d+)", "\n".join(lines))):
            yield path.stem, range(int(start), int(start) + int(length))


def test_each_comparison_has_test_pictures_of_its_own() -> None:
    """A choice that was made on pictures of one comparison must not tell what another one finds."""
    found = list(fresh_ranges())
    assert len(found) > 15
    for (one, own), (other, theirs) in combinations(found, 2):
        if not any({one, other} <= each for each in OF_ONE_RANGE):
            assert own.stop <= theirs.start or theirs.stop <= own.start, f"{one} {own}, {other} {theirs}"


def test_the_measured_attention_is_of_the_pictures_of_its_comparison() -> None:
    text = (EXAMPLES.parent / "benchmarks" / "attention_on_shapes.py").read_text("utf-8")
    assert f"scenes@test?start={dict(fresh_ranges())['few_answers_methods'].start}&" in text


def test_arms_of_zoom_read_equally_many_questions() -> None:
    """Its lists have a line for each question, and each engine keeps another number of them."""
    plan = make_plan(load_comparison(EXAMPLES / "zoom_without_zoom.yaml"))
    assert {run.config.data.train.partition("?")[2] for run in plan.runs} == {"limit=400"}


WITHOUT_CLIP_RD = {  # why a comparison with `clip_kd` has no `clip_rd`
    "one method's own parts": ("clip_kd_terms", "cmapkd_levels", "cmapkd_places", "cmapkd_stages", "term_weighting"),
    "clip_kd is one control of another question": ("clip_ping", "tipsv2", "photographs_unpaired"),
    "cmapkd_rivals asks it of clip_rd, on the same pictures and seeds": ("cmapkd_default",),
    "before clip_rd was here": (
        "cmapkd_attribution",
        "cmapkd_attribution_final",
        "leaderboard",  # leaderboard_tuned has it
    ),
    "photographs_folds has it, and these change one thing for some of its arms": (
        "photographs_folds_hinton",
        "photographs_folds_parts",
        "photographs_pretrained",
        "photographs_pretrained_first",
        "photographs_pretrained_views",
        "photographs_unseen",
    ),
}


def test_where_clip_kd_is_compared_clip_rd_is() -> None:
    lacking = set()
    for name in comparisons():
        methods = {run.config.method.name for run in make_plan(load_comparison(EXAMPLES / f"{name}.yaml")).runs}
        if "clip_kd" in methods and "clip_rd" not in methods:
            lacking.add(name)
    assert lacking == {name for names in WITHOUT_CLIP_RD.values() for name in names}

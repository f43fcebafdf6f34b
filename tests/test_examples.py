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
    assert {run.config.data.train.partition("?")[2] for run in plan.runs} == {"limit=800"}

"""Every comparison of examples/ can be planned, and its sources of the built-in world open as they are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cmapkd.compare import Plan, load_comparison, make_plan
from cmapkd.data.open import open_source

EXAMPLES = Path(__file__).parents[1] / "examples"
NEED_THE_WORLDS = {"selection_pilots", "selection_worlds"}  # a plugin of benchmarks/: tests/test_selection_worlds.py
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

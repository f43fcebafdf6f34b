"""What the benchmark of attention on shapes counts: covered parts of cells, and questions about one shape."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    benchmark: Any = importlib.import_module("attention_on_shapes")


def test_a_box_covers_parts_of_cells() -> None:
    box = SimpleNamespace(x=2, y=0, width=4, height=8)
    assert benchmark.cells(box, (8, 8), 2) == [0.5, 0.5, 0.5, 0.5]
    box = SimpleNamespace(x=4, y=4, width=2, height=2)
    assert benchmark.cells(box, (8, 8), 2) == [0, 0, 0, 0.25]


def test_shapes_that_stand_there_twice_are_left_out() -> None:
    boxes = [SimpleNamespace(name=name) for name in ("red cross", "blue ring", "blue ring")]
    asked = ("Is there a red cross?", "Is there a blue ring?", "How many rings are there?", "Is a red cross near?")
    sample = SimpleNamespace(boxes=boxes, questions=[SimpleNamespace(question=each) for each in asked])
    assert benchmark.about_one_shape(sample) == [(asked[0], boxes[0]), (asked[3], boxes[0])]

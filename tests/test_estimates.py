"""The estimates on paper are what their constants give, and every constant counts."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.data.types import ModelInput, TokenBatch
from cmapkd.evaluation.efficiency import count_macs
from cmapkd.models import build_model

ROOT = Path(__file__).parents[1]

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "benchmarks")
    estimates: Any = importlib.import_module("estimates")

CASE = estimates.CASES["CC12M, 8 GPUs"]


def test_the_committed_file_is_what_comes_out() -> None:
    assert json.loads(estimates.FILE.read_text(encoding="utf-8")) == json.loads(json.dumps(estimates.result()))


@pytest.mark.parametrize("name", estimates.MEASURED)
def test_every_constant_counts(name: str) -> None:
    known = estimates.constants()
    before = estimates.estimated(CASE, known)
    after = estimates.estimated(CASE, {**known, name: 3 * known[name]})
    assert before != after


@pytest.mark.parametrize("name", estimates.ASSUMED)
def test_every_assumption_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = estimates.estimated(CASE, estimates.constants())
    monkeypatch.setitem(estimates.ASSUMED, name, 3 * estimates.ASSUMED[name])
    assert before != estimates.estimated(CASE, estimates.constants())


def test_lines_by_hand() -> None:
    found = estimates.estimated(
        estimates.Case(pairs=3_600_000, shards=100, picture_bytes=50e3, gpus=4, batch=4096),
        {
            **estimates.constants(),
            "first_opening_us_a_pair": 30.0,
            "student_parameters": 2**20,
            "products_of_losses": 10,
            "checkpoint_s_a_gigabyte": 100.0,
            "row_bytes_fp16": 3000,
            "handed_over_mib": 36.75,
            "handed_over_pictures": 256,
        },
    )
    assert found["start: first opening, core hours"] == 0.03
    assert found["disk or network: read by a node, MB/s"] == 400
    assert found["network: gradients from a GPU in a step, MiB"] == 6.0  # of 4 MiB, there and back, three quarters
    assert found["network: embeddings to a GPU in a step, MiB"] == 12  # two of 8 MiB, three quarters
    assert found["losses of a step on a GPU, TFLOP"] == 0.043  # 10 x 2 x 4096² x 512 / 4
    assert found["checkpoint: size, GB"] == 0.013  # 12 bytes a parameter
    assert found["checkpoint: CPU time, s"] == 1.3
    assert found["cache: rows of embeddings in fp16, GB"] == 11
    assert found["memory: pixels of a step, GiB of a node"] == 1.1  # 8192 pictures of 147 kB


@pytest.mark.parametrize(
    ("value", "expected"), [(0.04567, 0.046), (9.96, 10.0), (123.4, 120), (4_312_000.0, 4_300_000)]
)
def test_two_digits(value: float, expected: float) -> None:
    assert estimates.rounded(value) == expected
    assert isinstance(estimates.rounded(value), int) == (value >= 10)


@pytest.mark.slow
def test_the_teachers_work_is_counted() -> None:
    teacher = build_model("open_clip:ViT-L-14").eval()
    ids = torch.full((1, 77), 49_407)  # CLIP's end token
    inputs = ModelInput(torch.zeros(1, 3, 224, 224), TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert 2 * count_macs(teacher, lambda: teacher(inputs)) / 1e9 == pytest.approx(
        estimates.ASSUMED["teacher_gflop_a_pair"], rel=1e-3
    )

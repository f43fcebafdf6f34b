"""The committed scores of a comparison are those of its kept runs."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def test_scores_of_the_attribution_are_those_of_its_runs() -> None:
    kept: dict[int, list[tuple[str, float, float]]] = {}
    for archive in sorted((RESULTS / "cmapkd_attribution_runs").glob("seed*.zip")):
        with zipfile.ZipFile(archive) as runs:
            for name in runs.namelist():
                if name.endswith("/metrics.json") and "-equal_time-" not in name:  # those have no table yet
                    found = json.loads(runs.read(name))
                    scores = found["student"]
                    row = (found["method"], scores["retrieval"]["mean_r@1"], scores["zero_shot"]["top1"])
                    kept.setdefault(found["seed"], []).append(row)
    with (RESULTS / "cmapkd_attribution.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 35
    for seed, expected in kept.items():
        told = [
            (row["method"], float(row["retrieval.mean_r@1"]), float(row["zero_shot.top1"]))
            for row in rows
            if int(row["seed"]) == seed
        ]
        assert len(told) == 7
        for one, other in zip(sorted(told), sorted(expected), strict=True):
            assert one[0] == other[0]
            assert one[1:] == pytest.approx(other[1:], abs=1e-6)
    assert sorted(kept) == [10, 11, 12, 13, 14]


def test_declared_contrasts_are_means_of_the_scores() -> None:
    with (RESULTS / "cmapkd_attribution.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    contrasts = json.loads((RESULTS / "cmapkd_attribution_contrasts.json").read_text(encoding="utf-8"))["contrasts"]
    assert len(contrasts) == 6
    for name, found in contrasts.items():
        arm, against = name.split(" - ")
        means = [
            sum(float(row["retrieval.mean_r@1"]) for row in rows if row["arm"] == each) / 5 for each in (arm, against)
        ]
        assert found["difference"] == pytest.approx(means[0] - means[1], abs=1e-6)
        assert found["low"] < found["difference"] < found["high"]
        resolved = found["p_holm"] <= 0.05
        sign = "above" if found["difference"] > 0 else "below"
        assert found["verdict"] == (sign if resolved else "not resolved")

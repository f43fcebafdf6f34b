"""The committed scores of a comparison are those of its kept runs."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "docs" / "results"


EQUAL_TIME = ", equal time"


def rows_of(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("name", "arms", "equal_time"),
    [("cmapkd_attribution.csv", 7, False), ("cmapkd_attribution_equal_time.csv", 6, True)],
)
def test_scores_of_the_attribution_are_those_of_its_runs(name: str, arms: int, equal_time: bool) -> None:
    kept: dict[int, list[tuple[str, float, float]]] = {}
    for archive in sorted((RESULTS / "cmapkd_attribution_runs").glob("seed*.zip")):
        with zipfile.ZipFile(archive) as runs:
            for run in runs.namelist():
                if run.endswith("/metrics.json") and ("-equal_time-" in run) == equal_time:
                    found = json.loads(runs.read(run))
                    scores = found["student"]
                    row = (found["method"], scores["retrieval"]["mean_r@1"], scores["zero_shot"]["top1"])
                    kept.setdefault(found["seed"], []).append(row)
    rows = rows_of(name)
    assert len(rows) == 5 * arms
    for seed, expected in kept.items():
        told = [
            (row["method"], float(row["retrieval.mean_r@1"]), float(row["zero_shot.top1"]))
            for row in rows
            if int(row["seed"]) == seed
        ]
        assert len(told) == arms
        for one, other in zip(sorted(told), sorted(expected), strict=True):
            assert one[0] == other[0]
            assert one[1:] == pytest.approx(other[1:], abs=1e-6)
    assert sorted(kept) == [10, 11, 12, 13, 14]


def test_declared_contrasts_are_means_of_the_scores() -> None:
    steps, time = rows_of("cmapkd_attribution.csv"), rows_of("cmapkd_attribution_equal_time.csv")
    time += [row for row in steps if row["arm"] == "cmapkd"]  # its time is the measure
    contrasts = json.loads((RESULTS / "cmapkd_attribution_contrasts.json").read_text(encoding="utf-8"))["contrasts"]
    assert len(contrasts) == 12
    for name, found in contrasts.items():
        rows = time if name.endswith(EQUAL_TIME) else steps
        arm, against = name.removesuffix(EQUAL_TIME).split(" - ")
        means = [
            sum(float(row["retrieval.mean_r@1"]) for row in rows if row["arm"] == each) / 5 for each in (arm, against)
        ]
        assert found["difference"] == pytest.approx(means[0] - means[1], abs=1e-6)
        assert found["low"] < found["difference"] < found["high"]
        resolved = found["p_holm"] <= 0.05
        sign = "above" if found["difference"] > 0 else "below"
        assert found["verdict"] == (sign if resolved else "not resolved")


def test_kept_results_name_no_folder_of_a_machine() -> None:
    files = [path for kind in ("json", "yaml", "csv") for path in RESULTS.glob(f"*.{kind}")]
    assert files
    absolute = re.compile(r"""["' ,]/(?:home|root|work|tmp|mnt|Users)/""")
    assert [path.name for path in files if absolute.search(path.read_text(encoding="utf-8"))] == []

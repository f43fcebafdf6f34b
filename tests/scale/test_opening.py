"""Opening many rows: CPU time beside a bare reading of the same bytes, memory that stays, and what workers are sent.

Measured with 20,000 and 200,000 rows on one core of an AMD EPYC, as multiples of the bare reading: JSONL 15 to 21, CSV
76 (whose bare reading is half a microsecond a row), parquet 12 to 45, images with texts beside them 2, class folders 8
(3 microseconds a row), token files of Flickr 74 (20 microseconds a row), COCO 17; tar 0.2 on an Intel Xeon. The limits
leave a factor of three for other machines and for noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from started import run_script

SLOWER = {  # than the bare reading
    "tar": 0.8,
    "jsonl": 65.0,
    "csv": 230.0,
    "parquet": 140.0,
    "folder": 6.0,
    "classes": 25.0,
    "flickr30k": 230.0,
    "coco": 50.0,
}
SELDOM = ("classes", "flickr30k", "coco")  # slow tests, so that the others stay short
KEPT = 12.0  # bytes of memory that stay, for each byte of ids and captions
AROUND = 16 * 2**20  # bytes that stay whatever the number of rows: indexes, arenas of Arrow, buffers
SENT = 16 * 2**10  # bytes that a data worker is sent


def opening(kind: str, rows: int, folder: Path) -> dict[str, float]:
    caches = {"XDG_CACHE_HOME": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    script = Path(__file__).with_name("opening.py")
    done = run_script(script, kind, str(rows), str(folder), timeout=900, environment=caches)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        *((kind, 20_000) for kind in SLOWER if kind not in SELDOM),
        *(pytest.param(kind, 20_000, marks=pytest.mark.slow) for kind in SELDOM),
        *(pytest.param(kind, 200_000, marks=pytest.mark.slow) for kind in SLOWER),
    ],
)
def test_opening_is_bounded_in_time_and_memory(kind: str, rows: int, tmp_path: Path) -> None:
    found = opening(kind, rows, tmp_path)
    assert found["opened"] <= SLOWER[kind] * found["bare"], found
    assert found["kept"] <= KEPT * found["text"] + AROUND, found
    assert found["sent"] <= SENT, found

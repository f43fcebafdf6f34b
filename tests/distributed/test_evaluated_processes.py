"""Scores and embeddings of several processes that evaluate together are those of one, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from started import run_script

sys.path.insert(0, str(Path(__file__).parent))
from evaluated_processes import BAD, LENGTHS, SIZES


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What groups of one, two and four processes found."""
    folder = tmp_path_factory.mktemp("evaluated")
    done = run_script(Path(__file__).with_name("evaluated_processes.py"), str(folder), timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def found(out: Path, size: int, rank: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((out / f"found-{size}-{rank}.json").read_text(encoding="utf-8"))
    return told


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("length", LENGTHS)
def test_several_processes_find_what_one_finds(out: Path, length: int, size: int) -> None:
    alone = torch.load(out / f"embedded-{length}-1.pt", weights_only=True)
    together = torch.load(out / f"embedded-{length}-{size}.pt", weights_only=True)
    assert alone.keys() == together.keys() > {"images", "texts", "labels", "of"}
    assert all(torch.equal(together[name], rows) for name, rows in alone.items())
    assert len(alone["images"]) == length - sum(index < length for index in BAD)
    assert found(out, size) == found(out, 1)
    assert found(out, 1)[f"scores {length}"]["retrieval"]["num_images"] == len(alone["images"])


@pytest.mark.parametrize("size", SIZES)
def test_the_first_bad_sample_is_an_error_everywhere_where_it_is_to_be(out: Path, size: int) -> None:
    for rank in range(size):
        assert found(out, size, rank)[f"refused {LENGTHS[0]}"] == found(out, 1)[f"refused {LENGTHS[0]}"]
        assert "bad-2" in found(out, size, rank)[f"refused {LENGTHS[0]}"]

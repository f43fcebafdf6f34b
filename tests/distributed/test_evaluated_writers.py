"""Answers and scores of several processes that evaluate a model that writes are those of one, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from started import run_script

sys.path.insert(0, str(Path(__file__).parent))
from evaluated_writers import FAULTS, LENGTHS, SIZES


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What groups of one, two and four processes found, and how two end of which one fails."""
    folder = tmp_path_factory.mktemp("evaluated")
    done = run_script(Path(__file__).with_name("evaluated_writers.py"), str(folder), timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def found(out: Path, length: int, size: int, rank: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((out / f"found-{size}-{rank}.json").read_text(encoding="utf-8"))[f"{length}"]
    return told


def test_one_process_finds_what_the_others_are_compared_with(out: Path) -> None:
    """Different answers, dialogues that cannot be asked, and scores of every kind."""
    alone = found(out, LENGTHS[0], 1)
    asked, again, described = alone["answers"]["written"]
    assert asked == again
    assert len(asked) == 24
    assert [place for place, answer in enumerate(asked) if answer is None] == [4, 5, 6, 7, 14]  # 4 to 7 are a batch
    assert len({answer[0] for answer in (*asked, *described) if answer}) > 5
    assert [sample for sample, _ in alone["answers"]["bad"]] == ["d2", "d3", "d8"]
    assert alone["answers"]["counts"] == {"images": 12, "captions": 24, "questions": 19}
    scores = alone["scores"]
    assert (scores["bad_samples"], scores["answering"]["num_questions"]) == (4, 19)
    assert scores["yes_no"]["by_odds"]["mean_margin"] != 0
    assert scores["describing"]["num_images"] == 12
    assert scores["perplexity"]["visual_gain"] != 0
    assert (alone["of captions"]["perplexity"]["of"], alone["validation"]["score"]) == (
        "captions",
        scores["answering"]["overall"],
    )
    assert not alone["too long"].keys() & {"answering", "yes_no", "perplexity"}
    assert alone["too long"]["describing"] == scores["describing"]


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("length", LENGTHS)
def test_several_processes_find_what_one_finds(out: Path, length: int, size: int) -> None:
    alone, together = (found(out, length, number) for number in (1, size))
    del alone["sizes"], together["sizes"]
    assert together == alone
    files = [(out / f"answers-{length}-{number}.safetensors").read_bytes() for number in (1, size)]
    assert files[0] == files[1]


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("length", LENGTHS)
def test_whole_batches_are_dealt_out_in_turn(out: Path, length: int, size: int) -> None:
    alone = found(out, length, 1)["sizes"]
    dealt = [found(out, length, size, rank)["sizes"] for rank in range(size)]
    assert sorted(alone) == sorted(number for sizes in dealt for number in sizes)
    if length > size:
        assert all(len(sizes) >= len(alone) // size - 1 > 0 for sizes in dealt)


@pytest.mark.parametrize("size", SIZES)
def test_the_first_bad_sample_is_an_error_everywhere_where_it_is_to_be(out: Path, size: int) -> None:
    for rank in range(size):
        assert "d3" in found(out, LENGTHS[0], size, rank)["refused"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_process_that_fails_ends_the_other(out: Path, fault: str) -> None:
    assert json.loads((out / "ends.json").read_text(encoding="utf-8"))[fault] == [1, 1]
    failing = 1 if fault == "another fails" else 0
    errors = [(out / f"{fault}-{rank}.txt").read_text(encoding="utf-8") for rank in range(2)]
    why = "NothingReadError" if fault == "nothing can be read" else "'NoneType' object is not callable"
    assert why in errors[failing]
    assert why not in errors[1 - failing]

"""Every malformed input ends in an error of ours or a counted skip: a sample of each kind here, all of them as `slow`."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from random import Random

import guard
import pytest
from corpus import KINDS, Exploit, outcome
from guard import WrongResult, judge

SAMPLE, ALL = 3, 40
UNREPEATABLE = (
    "cache manifests",
    "cache shards",
    "checkpoints",
    "transformers folders",
)  # what they spoil is made once


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_the_corpus(kind: str) -> None:
    ends = {seed: outcome(kind, seed) for seed in range(SAMPLE)}
    assert not {seed: end.detail for seed, end in ends.items() if end.ending == "failure"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_corpus(kind: str) -> None:
    """More than 1,000 inputs: docs/reliability.md has the table."""
    assert ALL * len(KINDS) > 1000
    ends = {seed: outcome(kind, seed) for seed in range(ALL)}
    assert not {seed: end.detail for seed, end in ends.items() if end.ending == "failure"}
    assert any(end.ending in ("refused", "skipped") for end in ends.values())  # else nothing was spoiled


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNREPEATABLE])
def test_an_input_is_the_same_whenever_it_is_made(kind: str, tmp_path: Path) -> None:
    made = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        KINDS[kind](Random(f"{kind} 1"), tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file() and path.suffix != ".pt")
        made.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files if os.access(path, os.R_OK)
                     and path.resolve().is_relative_to(tmp_path)})  # fmt: skip
    assert made[0] == made[1]


# ------------------------------------------------------------------------------------------------ the judge itself


def ended(attempt: object, folder: Path) -> str:
    end = judge(attempt, folder)  # type: ignore[arg-type]
    return f"{end.ending}: {end.detail}"


def test_the_judge_sees_files_outside(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    outside = tmp_path / "outside"
    for attempt in (
        lambda: outside.write_text("x") and (1, 0),
        lambda: outside.with_name("other").mkdir() or (1, 0),
        lambda: (Path("inside").write_text("x") and os.rename("inside", outside)) or (1, 0),  # noqa: PTH104
        lambda: Path("link").symlink_to(outside) or (Path("link").write_text("x") and (1, 0)),
    ):
        assert ended(attempt, tmp_path / "own").startswith("failure: outside: ")
    assert ended(lambda: Path("inside").write_text("x") and (1, 0), tmp_path / "own") == "read: 1"


def test_the_judge_sees_code_that_runs(tmp_path: Path) -> None:
    data = pickle.dumps(Exploit())
    assert "pickle.find_class" in ended(lambda: pickle.loads(data) and (1, 0), tmp_path)  # noqa: S301
    assert "os.system" in ended(lambda: os.system("true") or (1, 0), tmp_path)


def test_the_judge_sees_hangs_memory_and_wrong_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spin() -> tuple[int, int]:
        while True:
            pass

    def wrong() -> tuple[int, int]:
        raise WrongResult("other pixels than were written")

    with monkeypatch.context() as patch:
        patch.setattr(guard, "SECONDS", 1)
        assert ended(spin, tmp_path).startswith("failure: more than 1 seconds")
        patch.setattr(guard, "WAITING", 1)
        assert ended(lambda: time.sleep(30) or (1, 0), tmp_path).startswith("failure: more than")
    assert ended(lambda: (len(bytearray(2 * guard.ROOM)), 0), tmp_path).startswith("failure: MemoryError")
    assert ended(wrong, tmp_path).startswith("failure: WrongResult")


def test_the_judge_wants_words_of_ours(tmp_path: Path) -> None:
    from cmapkd.config import apply_overrides

    assert ended(lambda: int("x") and (1, 0), tmp_path).startswith("failure: ValueError")  # Python's, not ours
    assert ended(lambda: {}["x"], tmp_path).startswith("failure: KeyError")
    assert ended(lambda: b"\xff".decode() and (1, 0), tmp_path).startswith("failure: UnicodeDecodeError")
    assert ended(lambda: apply_overrides({}, ["x"], where="y") and (1, 0), tmp_path).startswith("refused: ConfigError")
    assert ended(lambda: (3, 2), tmp_path) == "skipped: 2 of 5"

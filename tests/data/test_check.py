"""The ledger of good and bad samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmapkd.data.check import MOST_KINDS, MOST_LISTED, OTHER_KINDS, SampleLedger, TooManyBadSamples


def test_counts_by_kind_and_lists_a_sample_once() -> None:
    ledger = SampleLedger()
    ledger.add(6, [("a", "image is truncated: 3 bytes"), ("b", "image is truncated: 9 bytes")])
    ledger.add(2, [("a", "image is truncated: 3 bytes"), ("c", "caption is not UTF-8"), ("d", "no caption")])
    assert (ledger.num_good, ledger.num_bad, ledger.num_without_caption) == (8, 4, 1)
    assert ledger.kinds == {"image is truncated": 3, "caption is not UTF-8": 1}
    assert [sample_id for sample_id, _ in ledger.bad] == ["a", "b", "c"]
    assert ledger.share() == 4 / 12
    assert ledger.summary() == (
        "8 samples read, 4 bad (3 image is truncated, 1 caption is not UTF-8), 1 without caption"
    )
    assert SampleLedger().summary() == "0 samples read, 0 bad"


def test_too_many() -> None:
    ledger = SampleLedger()
    ledger.add(963, [(f"s{i}", "image is empty (0 bytes)") for i in range(37)])
    ledger.check_share(0.037)
    with pytest.raises(
        TooManyBadSamples,
        match=r"37 of 1,000 readings of samples \(3\.7 %\) failed, more than max_bad_share 1 %: first: s0: image",
    ):
        ledger.check_share(0.01)


def test_a_share_just_above_the_limit_does_not_look_like_it() -> None:
    ledger = SampleLedger()
    ledger.add(96, [("s0", "image is empty (0 bytes)")])
    with pytest.raises(TooManyBadSamples) as stopped:
        ledger.check_share(0.01, minimum=1, ended=True)
    assert "1 of 97 readings of samples (1.03 %) failed, more than max_bad_share 1 %" in str(stopped.value)
    assert "All steps are trained and saved." in str(stopped.value)
    assert stopped.value.settings == ("data.max_bad_share=0.02",)  # enough, so that the same command ends


def test_few_samples_prove_nothing_unless_asked() -> None:
    ledger = SampleLedger()
    ledger.check_share(0.0)
    ledger.add(1, [("a", "x")])
    ledger.check_share(0.01)
    with pytest.raises(TooManyBadSamples, match="1 of 2 readings"):
        ledger.check_share(0.01, minimum=2)


def test_without_caption_is_not_bad() -> None:
    ledger = SampleLedger()
    ledger.add(100, [(str(i), "no caption") for i in range(100)])
    ledger.check_share(0.0)


def test_state_goes_around_and_processes_add_up() -> None:
    first, second = SampleLedger(), SampleLedger()
    first.add(3, [("a", "x: 1"), ("n", "no caption")])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    second.add(1, [("b", "y")])
    first.merge(second.state_dict())
    assert (first.num_good, first.num_bad, first.num_without_caption) == (7, 3, 2)
    assert first.bad == (("a", "x: 1"), ("b", "y"))


def test_write(tmp_path: Path) -> None:
    ledger = SampleLedger()
    ledger.add(0, [("é\n", "x")])
    path = ledger.write(tmp_path / "run")
    ledger.add(0, [("b", "y")])
    assert ledger.write(tmp_path / "run") == path
    assert path.name == "bad_samples.jsonl"
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["é\n", "b"]
    assert list(path.parent.iterdir()) == [path]


def test_a_million_bad_samples_stay_small() -> None:
    ledger, other = SampleLedger(), SampleLedger()
    for start in range(0, 1_000_000, 1000):
        ledger.add(0, [(f"{i:07d}", f"image is truncated: {i} bytes") for i in range(start, start + 1000)])
    assert ledger.num_bad == ledger.kinds["image is truncated"] == 1_000_000
    assert [sample_id for sample_id, _ in ledger.bad] == [f"{i:07d}" for i in range(MOST_LISTED)]
    assert len(json.dumps(ledger.state_dict())) < 100_000
    other.add(0, [(f"x{i}", "image is empty") for i in range(5000)])
    other.merge(ledger.state_dict())
    assert other.num_bad == 1_005_000
    assert len(other.bad) == MOST_LISTED
    other.load_state_dict(ledger.state_dict())
    assert other.state_dict() == ledger.state_dict()


def test_kinds_and_reasons_stay_small() -> None:
    ledger = SampleLedger()
    ledger.add(0, [("a" * 9999, f"kind {i}: {'x' * 9999}") for i in range(1000)])
    assert len(ledger.kinds) == MOST_KINDS + 1
    assert ledger.kinds[OTHER_KINDS] == 1000 - MOST_KINDS
    assert sum(ledger.kinds.values()) == ledger.num_bad == 1000
    assert len(json.dumps(ledger.state_dict())) < 10_000


def test_an_older_and_longer_ledger_is_cut_when_it_is_loaded() -> None:
    state = SampleLedger().state_dict() | {"num_bad": 3000, "bad": [[str(i), "x"] for i in range(3000)]}
    ledger = SampleLedger()
    ledger.load_state_dict(state)
    assert (ledger.num_bad, len(ledger.bad)) == (3000, MOST_LISTED)

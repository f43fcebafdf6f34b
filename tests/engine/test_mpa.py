"""Model Parity Aligner: the published filter, how its annotations are read, and its precision against the world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmapkd.cli.engine import engine
from cmapkd.data.open import open_source
from cmapkd.engine import load_engine
from cmapkd.engine.filters import letters, parity, says
from cmapkd.engine.proposals import parse
from cmapkd.evaluation.vqa import vqa_accuracy

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "mpa.json").read_text())


def test_the_filter_is_the_published_one() -> None:
    assert {text: letters(text) for text in PUBLISHED["letters"]} == PUBLISHED["letters"]
    assert [place for place, row in enumerate(PUBLISHED["rows"]) if parity(*row)] == PUBLISHED["kept"]
    assert PUBLISHED["kept"]


def test_equal_answers_are_no_parts_of_others() -> None:
    assert says("there are 10", "1", match="contained")
    assert not says("10", "1", match="equal")
    assert says("A disc.", "the disc", match="equal")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Question: What is it?\nAnswer: a ring", ("What is it?", "a ring")),
        ("sure!\n- question:  Is it red? Yes?\n- answer: yes \nmore", ("Is it red?", "yes")),
        ("Question: no mark\nAnswer: 3", ("", "3")),
        ("Question: ?\nAnswer:", ("", None)),
        ("What is it? A ring", ("", None)),
    ],
)
def test_annotations_are_read_as_published(text: str, found: tuple[str, str | None]) -> None:
    assert parse(text) == found


def test_precision_against_the_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted over questions whose right answers the world knows, and the engine never read."""
    out, data = tmp_path / "mpa", "scenes?start=800000&length=10"
    engine("mpa_scenes", out, [f"data={data}", "shard_samples=10"])
    assert "kept.jsonl, random.jsonl, manifest.json" in capsys.readouterr().out
    source = open_source(data)
    asked = {
        f"{sample.id}#{number}": question
        for sample in map(source.__getitem__, range(len(source)))
        for number, question in enumerate(sample.questions)
    }
    rows = [json.loads(line) for line in (out / "shards/000000/candidates.jsonl").read_text().splitlines()]
    assert {row["id"]: row["relation"] for row in rows} == {  # random answers are as many of each kind
        each: question.kind for each, question in asked.items()
    }
    answered = [row for row in rows if row.get("answer")]
    right = {row["id"]: vqa_accuracy(row["answer"], asked[row["id"]].answers) for row in answered}
    kept = [right[row["id"]] for row in answered if row["dropped"] is None]
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert (len(rows), len(kept)) == (counts["candidates"], counts["kept"])
    assert len(rows) == len(asked)
    before, after = sum(right.values()) / len(right), sum(kept) / len(kept)
    assert after > before + 0.03, (before, after)  # 0.49 and 0.58 of 64 pictures


def test_the_published_recipe_is_one() -> None:
    config = load_engine("mpa")
    assert config.propose.written is not None
    assert config.propose.written.max_new_tokens == config.answers["small"].max_new_tokens == 128
    assert config.labels == ("parity",)

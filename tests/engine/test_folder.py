"""The lists of an engine's folder: what a control may draw, and how many of it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.types import Sample
from cmapkd.engine.candidates import Candidate
from cmapkd.engine.config import WriteConfig
from cmapkd.engine.folder import EngineFolder
from cmapkd.engine.run import told

GREY = Image.new("RGB", (8, 8), (128, 128, 128))


def written(path: Path, candidates: list[Candidate]) -> EngineFolder:
    folder = EngineFolder(path, WriteConfig(control=True), seed=3)
    folder.begin()
    folder.finish_shard(0, candidates, samples=len(candidates))
    return folder


def candidate(number: int, **values: Any) -> Candidate:
    return Candidate(Sample(f"s{number}", GREY), number, 0, **{"question": "What is it?", "answer": "red", **values})


def listed(folder: EngineFolder, name: str) -> list[str | None]:
    source = open_source(f"jsonl:{folder.path / name}")
    return [question.id for place in range(len(source)) for question in source[place].questions]


def test_the_control_draws_no_proposal_that_is_no_question(tmp_path: Path) -> None:
    no_questions = [candidate(place, question="", dropped="parsed") for place in range(20)]
    no_questions += [candidate(place, answer="x" * 3000, dropped="readable") for place in range(20, 40)]
    others = [candidate(40), candidate(41), candidate(42, dropped="parity")]
    folder = written(tmp_path, [*no_questions, *others])
    assert folder.join(1) == 2
    assert listed(folder, "kept.jsonl") == ["s40#0", "s41#0"]
    assert len(drawn := listed(folder, "random.jsonl")) == 2
    assert set(drawn) < {each.id for each in others}


def test_the_control_is_drawn_within_each_relation(tmp_path: Path) -> None:
    relations = {"colour": (8, 10), "shape": (2, 30), "texture": (0, 30)}  # kept, of all
    facts = [
        candidate(100 * group + place, relation=name, dropped=None if place < kept else "critic")
        for group, (name, (kept, number)) in enumerate(relations.items())
        for place in range(number)
    ]
    folder = written(tmp_path, facts)
    assert folder.join(1) == 10
    of: dict[str | None, str | None] = {each.id: each.relation for each in facts}
    assert Counter(of[name] for name in listed(folder, "random.jsonl")) == {"colour": 8, "shape": 2}
    counts = folder.counts(1)
    assert counts["relations"] == {name: {"candidates": n, "kept": k} for name, (k, n) in relations.items()}
    assert "10 kept (8 of 10 of colour, 2 of 30 of shape, 0 of 30 of texture), 60 dropped as critic" in told(counts)


def test_a_line_without_its_filter_is_damaged(tmp_path: Path) -> None:
    folder = written(tmp_path, [candidate(0)])
    lines, record = (folder.shard(0) / name for name in ("candidates.jsonl", "record.json"))
    line = json.loads(lines.read_text())
    del line["dropped"]
    lines.write_text(json.dumps(line))
    digest = hashlib.blake2b(lines.read_bytes(), digest_size=16).hexdigest()
    record.write_text(json.dumps({**json.loads(record.read_text()), "digest": digest}))
    with pytest.raises(ConfigError, match=r"candidates\.jsonl is damaged"):
        folder.join(1)


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "changed"])
def test_a_picture_that_is_not_as_it_was_written_is_found(tmp_path: Path, gone: bool) -> None:
    folder = written(tmp_path, [candidate(0)])
    folder.join(1)
    (picture,) = (folder.shard(0) / "pictures").iterdir()
    picture.unlink() if gone else picture.write_bytes(picture.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=rf"{picture.name} is damaged: remove the folder {folder.shard(0)}, and"):
        folder.join(1)


def test_folders_are_flushed_with_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr("cmapkd.engine.folder.flush", lambda path: flushed.append(path.name))
    folder = written(tmp_path / "out", [candidate(0)])
    assert flushed.index("000000000.png") < flushed.index("pictures") < flushed.index("shards")
    folder.join(1)
    assert flushed[-1] == "out"

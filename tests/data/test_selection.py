"""Which samples to label next: greedy k-centre against a loop, balance, and the command."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cmapkd.cli import app
from cmapkd.config import ConfigError
from cmapkd.config.disk import DiskError
from cmapkd.data.open import open_source
from cmapkd.data.selection import balanced, covering_radius, greedy_k_centre
from cmapkd.models.classifier import AnswerRule, ClassHeadConfig
from helpers import make_classifier

WORLD = "scenes:easy?length=40&size=32"


@pytest.mark.parametrize("labelled", [0, 3])
def test_greedy_k_centre_is_the_loop(labelled: int) -> None:
    torch.manual_seed(0)
    points, start = torch.rand(20, 4).double().softmax(1), torch.rand(labelled, 4).double()
    points[5] = points[9]  # of two in one place the second has no distance left
    found = greedy_k_centre(points, start, 8).tolist()
    centres, taken = [*start], []
    for _ in range(8):
        best, place = -1.0, -1
        for number, point in enumerate(points):
            if number in taken:
                continue
            if centres:
                distance = min(float((point - centre).norm()) for centre in centres)
            else:
                distance = 10 - float((point - points.mean(0)).norm())
            if distance > best + 1e-12:
                best, place = distance, number
        taken.append(place)
        centres.append(points[place])
    assert found == taken
    assert not {5, 9} <= set(found)
    radius = covering_radius(points, points[found])
    others = [covering_radius(points, points[torch.randperm(20)[:8]]) for _ in range(5)]
    assert radius <= min(others) + 1e-9


def test_all_points_can_be_taken_once() -> None:
    assert sorted(greedy_k_centre(torch.zeros(5, 2), torch.empty(0, 2), 5).tolist()) == list(range(5))
    assert greedy_k_centre(torch.zeros(5, 2), torch.empty(0, 2), 0).tolist() == []
    with pytest.raises(ValueError, match="6 of 5 points"):
        greedy_k_centre(torch.zeros(5, 2), torch.empty(0, 2), 6)
    with pytest.raises(ValueError, match="one width"):
        greedy_k_centre(torch.zeros(5, 2), torch.empty(0, 3), 1)


def test_balance_has_as_many_of_each_class() -> None:
    classes = [0] * 10 + [1] * 2 + [2] * 10 + [-1] * 3
    ids = [str(number) for number in range(25)]
    found = balanced(classes, ids, 8)
    assert Counter(classes[place] for place in found) == {0: 3, 1: 2, 2: 3}
    assert found == sorted(set(found))
    assert balanced(classes, ids, 8, draw=1) != found
    assert set(balanced(classes, ids, 6)) <= set(found)
    with pytest.raises(ValueError, match="23 samples are asked for, and 22 have a class"):
        balanced(classes, ids, 23)


def test_the_command_writes_ids_that_a_source_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*words: str) -> str:
        return CliRunner().invoke(app, ["select", WORLD, *words], catch_exceptions=False).output

    source, first, more = open_source(WORLD, split="train"), tmp_path / "first.txt", tmp_path / "more.txt"
    assert "10 ids of scenes/easy/train" in call("--by", "balance", "--budget", "10", "--out", str(first))
    assert len(open_source(f"{WORLD}&ids={first}", split="train")) == 10
    model = make_classifier()
    heads = {"labels": ClassHeadConfig(), "teacher": ClassHeadConfig()}
    assert source.class_names is not None
    model.set_heads(source.class_names, heads, AnswerRule(heads=("labels", "teacher"), alpha=0.5))
    model.save(tmp_path / "model")
    chosen = ("--by", "pcoreset", "--model", str(tmp_path / "model"), "--labelled", str(first))
    call(*chosen, "--budget", "5", "--out", str(more))
    taken = more.read_text().split()
    assert len(set(taken)) == 5
    assert not set(taken) & set(first.read_text().split())
    unknown = tmp_path / "unknown.txt"
    unknown.write_text("nobody\n")
    for words, why in (
        (("--by", "pcoreset", "--budget", "5", "--out", "x"), "name a model with --model"),
        (("--by", "pcorset", "--budget", "5", "--out", "x"), r"did you mean 'pcoreset'"),
        ((*chosen, "--budget", "31", "--out", "x"), "and 30 samples are not labelled yet"),
        (("--by", "balance", "--budget", "5", "--out", str(more)), "is there already"),
        (
            ("--by", "balance", "--budget", "5", "--labelled", str(unknown), "--out", "x"),
            "1 of the labelled ids are of",
        ),
        (
            ("--by", "pcoreset", "--budget", "5", "--model", "pictures:tiny:debug", "--out", "x"),
            "cmapkd select needs .* has an image tower alone",
        ),
    ):
        with pytest.raises(ConfigError, match=why):
            call(*words)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("cmapkd.cli.select._probabilities", lambda *_: pytest.fail("a model was asked"))
    with pytest.raises(ConfigError, match="--budget is 31, and 30 samples"):
        call(*chosen, "--budget", "31", "--out", "x")
    with pytest.raises(DiskError, match="cannot be written"):
        call(*chosen, "--budget", "5", "--out", str(tmp_path / "file" / "x"))

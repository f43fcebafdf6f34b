"""Ranks by picture: what the file holds, how small it is, that scores follow from it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from cmapkd.compare.pictures import measures_of, score_pictures
from cmapkd.data.open import open_source
from cmapkd.evaluation import EvaluationConfig, evaluate
from cmapkd.evaluation.picture_ranks import PictureRanks
from cmapkd.evaluation.ranking import RankCounts
from helpers import make_model

METRICS = ("retrieval.mean_r@1", "retrieval.i2t.r@5", "retrieval.t2i.r@10", "retrieval.i2t.mean_rank")


def at(scores: dict, path: str) -> float:  # type: ignore[type-arg]
    for key in path.split("."):
        scores = scores[key]
    return float(scores)  # type: ignore[arg-type]


def counts(queries: int, candidates: int, *, ties: bool = False) -> RankCounts:
    draw = torch.Generator().manual_seed(0)
    better = torch.randint(candidates, (queries,), generator=draw)
    equal = torch.randint(3, (queries,), generator=draw) if ties else torch.zeros(queries, dtype=torch.long)
    return RankCounts(better, equal, 1 + equal // 2)


def picture_ranks(pictures: int, captions: int, *, ties: bool = False) -> PictureRanks:
    return PictureRanks(
        "digest",
        torch.full((pictures,), captions),
        torch.ones(pictures, dtype=torch.bool),
        {
            "i2t": counts(pictures, pictures * captions, ties=ties),
            "t2i": counts(pictures * captions, pictures, ties=ties),
            "zero_shot": counts(pictures, 100, ties=ties),
        },
    )


def test_scores_follow_from_the_kept_ranks(tmp_path: Path) -> None:
    """Of a real evaluation, in which equal captions of several pictures tie."""
    source = open_source("scenes@test?length=60&size=32")
    scores = evaluate(make_model(), source, device="cpu", ranks_file=tmp_path / "ranks.safetensors")
    ranks = PictureRanks.load(tmp_path / "ranks.safetensors")
    for path in (*METRICS, *(["zero_shot.top1"] if "zero_shot" in scores else [])):
        means = [score_pictures(ranks, measure).mean for measure in measures_of(path)]
        assert sum(means) / len(means) == pytest.approx(at(scores, path)), path
    assert score_pictures(ranks, "t2i.r@1").queries.sum() == scores["retrieval"]["num_texts"]


def test_pictures_without_caption_or_label_have_no_query(tmp_path: Path) -> None:
    ranks = PictureRanks(
        "digest",
        torch.tensor([2, 0, 1]),
        torch.tensor([False, True, False]),
        {"i2t": counts(2, 3), "t2i": counts(3, 3), "zero_shot": counts(1, 9)},
    )
    ranks.save(tmp_path / "ranks.safetensors")
    loaded = PictureRanks.load(tmp_path / "ranks.safetensors")
    assert score_pictures(loaded, "i2t.r@1").queries.tolist() == [1, 0, 1]
    assert score_pictures(loaded, "t2i.r@1").queries.tolist() == [2, 0, 1]
    assert score_pictures(loaded, "zero_shot.top1").queries.tolist() == [0, 1, 0]
    expected = ranks.ranks["t2i"].expected()
    assert score_pictures(loaded, "t2i.mean_rank").sums.tolist() == [float(expected[:2].sum()), 0, float(expected[2])]


@pytest.mark.parametrize("ties", [False, True])
def test_the_file_gives_back_what_was_kept(tmp_path: Path, ties: bool) -> None:
    ranks = picture_ranks(300, 5, ties=ties)
    ranks.save(tmp_path / "ranks.safetensors")
    loaded = PictureRanks.load(tmp_path / "ranks.safetensors")
    assert loaded.digest == "digest"
    assert torch.equal(loaded.captions, ranks.captions)
    assert torch.equal(loaded.labelled, ranks.labelled)
    for task, expected in ranks.ranks.items():
        for name in ("better", "equal_negatives", "equal_positives"):
            assert torch.equal(getattr(loaded.ranks[task], name), getattr(expected, name)), (task, name)


@pytest.mark.parametrize(("ties", "bytes_a_picture"), [(False, 15), (True, 29)])
def test_a_picture_takes_few_bytes(tmp_path: Path, ties: bool, bytes_a_picture: int) -> None:
    """Five captions, 1,000 pictures, 100 classes; the file's header is 600 bytes or so."""
    picture_ranks(1000, 5, ties=ties).save(tmp_path / "ranks.safetensors")
    size = (tmp_path / "ranks.safetensors").stat().st_size
    assert 1000 * bytes_a_picture <= size < 1000 * bytes_a_picture + 1000


def test_the_digest_tells_other_pictures_and_captions_apart(tmp_path: Path) -> None:
    def digest(source: str) -> str:
        evaluate(make_model(), open_source(source), device="cpu", ranks_file=tmp_path / "ranks.safetensors")
        return PictureRanks.load(tmp_path / "ranks.safetensors").digest

    first = digest("scenes@test?length=8&size=32")
    assert digest("scenes@test?length=8&size=32") == first
    assert digest("scenes@test?length=9&size=32") != first
    assert digest("scenes@val?length=8&size=32") != first


def test_nothing_is_kept_of_very_many_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmapkd.evaluation.suite.MAX_PICTURES", 7)
    source = open_source("scenes@test?length=8&size=32")
    evaluate(make_model(), source, EvaluationConfig(), device="cpu", ranks_file=tmp_path / "ranks.safetensors")
    assert not (tmp_path / "ranks.safetensors").exists()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranks.safetensors"
    picture_ranks(20, 1).save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"no tensors", whole[:-5], whole.replace(b'"digest"', b'"digset"')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="holds no ranks of pictures"):
            PictureRanks.load(path)
    for columns in (
        {"captions": np.ones(3, np.uint8), "labelled": np.ones(2, np.uint8)},
        {"captions": np.ones((2, 2), np.uint8), "labelled": np.ones((2, 2), np.uint8)},
        {"captions": np.full(2, np.nan), "labelled": np.ones(2, np.uint8)},
    ):
        path.write_bytes(safetensors.numpy.save(columns, metadata={"digest": "digest"}))
        with pytest.raises(ValueError, match="holds no ranks of pictures"):
            PictureRanks.load(path)
    wrong = PictureRanks("digest", torch.tensor([1, 1]), torch.tensor([True, True]), {"i2t": counts(3, 2)})
    wrong.save(path)
    with pytest.raises(ValueError, match="shape"):
        PictureRanks.load(path)

"""Caption metrics against the reference tool's output, CLIPScore against its definition, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.evaluation import caption_tools
from cmapkd.evaluation.caption_tools import tokenise
from cmapkd.evaluation.captioning import CaptionScores, caption_scores, clip_scores
from cmapkd.evaluation.tools import MissingToolError

tools = pytest.mark.skipif(
    shutil.which("java") is None, reason="no java on the PATH, which the PTB tokeniser and METEOR need"
)

REFERENCE_NAMES = {
    "Bleu_1": "bleu_1",
    "Bleu_2": "bleu_2",
    "Bleu_3": "bleu_3",
    "Bleu_4": "bleu_4",
    "METEOR": "meteor",
    "ROUGE_L": "rouge_l",
    "CIDEr": "cider",
}


@tools
@pytest.mark.parametrize("name", ["caption_fakecap126", pytest.param("caption_human500", marks=pytest.mark.slow)])
def test_scores_of_the_reference(name: str, shared: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    given = json.loads((shared / "metric_parity" / f"{name}.json").read_text())
    expected = json.loads((shared / "metric_parity" / f"{name}.expected.json").read_text())
    assert tokenise(given["references"]) == expected["tokenized"]["references"]
    said = tokenise({image: [caption] for image, caption in given["candidates"].items()})
    assert {image: caption for image, (caption,) in said.items()} == expected["tokenized"]["candidates"]
    scores = caption_scores(given["candidates"], given["references"])
    assert set(scores.corpus) == set(REFERENCE_NAMES.values())
    for theirs, ours in REFERENCE_NAMES.items():
        assert scores.corpus[ours] == pytest.approx(expected["corpus"][theirs], abs=1e-12), theirs
        assert scores.per_image[ours] == pytest.approx(expected["per_image"][theirs], abs=1e-12), theirs
    assert (scores.num_images, scores.num_empty) == (expected["n"], 0)


@tools
@pytest.mark.parametrize("which", ["good", "bad"])
@pytest.mark.parametrize(
    "metrics",
    [
        ("bleu", "rouge_l", "cider"),
        pytest.param(("bleu", "rouge_l", "cider", "meteor"), marks=pytest.mark.slow),  # it reads 60 MB first
    ],
)
def test_published_example(which: str, metrics: tuple[str, ...], shared: Path) -> None:
    """The four digits in the README of jmhessel/clipscore; SPICE and CLIPScore need models that are not here."""
    pytest.importorskip("pycocoevalcap")
    example = json.loads((shared / "metric_parity" / "caption_clipscore_example.json").read_text())
    scores = caption_scores(example[which]["candidates"], example["references"], metrics=metrics).corpus
    names = {f"BLEU-{n}": f"bleu_{n}" for n in (1, 2, 3, 4)} | {
        "METEOR": "meteor", "ROUGE": "rouge_l", "CIDER": "cider"
    }  # fmt: skip
    for theirs, ours in names.items():
        if ours == "meteor" and ours not in metrics:
            continue
        assert scores[ours] == pytest.approx(example[which]["published"][theirs], abs=0.5e-4), theirs


@pytest.fixture(scope="module")
def odd() -> CaptionScores:
    """Captions that a line protocol, a tokeniser or a division could stumble over."""
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("no java on the PATH")
    predictions = {"empty": "", "lines": "a cat\u2028on\na ||| mat", "marks": "...", "same": "é xu"}
    references = {
        "empty": ["a dog runs"],
        "lines": ["a cat on a mat", "b ||| c"],
        "marks": ["a red dog"],
        "same": ["É xu."],
    }
    return caption_scores(predictions, references)


def test_empty_predictions_are_counted_and_score_nothing(odd: CaptionScores) -> None:
    assert (odd.num_images, odd.num_references, odd.num_empty) == (4, 5, 2)
    for metric in ("bleu_1", "meteor", "rouge_l", "cider"):
        assert [odd.per_image[metric][image] for image in ("empty", "marks")] == pytest.approx([0, 0], abs=1e-6), metric


def test_captions_stay_with_their_images(odd: CaptionScores) -> None:
    assert odd.per_image["rouge_l"]["same"] == 1
    assert odd.per_image["meteor"]["same"] == 1
    assert odd.per_image["bleu_1"]["lines"] > 0.8
    assert json.loads(json.dumps(odd.to_dict()))["num_empty"] == 2


@tools
def test_tokeniser() -> None:
    pytest.importorskip("pycocoevalcap")
    assert tokenise({"b": ['A dog\'s "tail" (brown)...', ""], "a": ["3.5%\r\nof it"]}) == {
        # the tool drops "-LRB-" and lowers it first, so parentheses stay
        "b": ["a dog 's tail -lrb- brown -rrb-", ""],
        "a": ["3.5 % of it"],
    }
    with pytest.raises(ValueError, match="no Unicode text"):
        tokenise({"a": ["broken \udcff caption"]})


GOOD: dict[str, Any] = {
    "predictions": {"a": "a cat", "b": "a dog"},
    "references": {"a": ["the cat"] * 5, "b": ["the dog"] * 5},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": {}, "predictions": {}}, "there are no references"),
        ({"predictions": {"a": "x", "b": "x", "z": "x"}}, "1 of 3 predictions are for images without references.*'z'"),
        ({"predictions": {"a": "x"}}, "1 of 2 images have no prediction, the first 'b'"),
        (
            {"references": {"a": ["the cat"], "b": []}},
            "1 of 2 images have fewer than 1 references, the first 'b' with 0",
        ),
        (
            {"references": {"a": ["the cat"] * 5, "b": ["x"]}, "min_references": 5},
            "fewer than 5 references.*'b' with 1",
        ),
        ({"references": {"a": ["the cat", " "], "b": ["x"]}}, "'a' has an empty reference"),
        ({"references": {"a": "the cat", "b": ["x"]}}, "'a' has an empty reference, or no list"),
        ({"predictions": {"a": None, "b": "x"}}, "prediction for image 'a' is not text"),
        ({"metrics": ["cider", "blue"]}, "unknown metric 'blue'.*bleu"),
        ({"metrics": "bleu"}, "metrics must be one or more"),
        ({"metrics": []}, "metrics must be one or more"),
        ({"min_references": 0}, "min_references must be at least 1"),
    ],
)
def test_wrong_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        caption_scores(**(GOOD | changes))


@tools
def test_what_only_the_tokeniser_shows() -> None:
    pytest.importorskip("pycocoevalcap")
    with pytest.raises(ValueError, match=r"over 1 image every weight is zero"):
        caption_scores({"a": "a cat"}, {"a": ["a cat"]}, metrics=["cider"])
    with pytest.raises(ValueError, match="references of punctuation alone, the first 'a'"):
        caption_scores({"a": "a cat"}, {"a": ["..."]}, metrics=["bleu"])
    assert set(caption_scores({"a": "a cat"}, {"a": ["a cat"]}, metrics=["rouge_l"]).corpus) == {"rouge_l"}


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tools.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingToolError, match="uv sync --inexact --extra captions"):
        caption_scores(**GOOD)


def test_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(caption_tools.shutil, "which", lambda name: None)
    with pytest.raises(MissingToolError, match="install a Java runtime"):
        caption_scores(**GOOD)


@tools
def test_spice_is_never_downloaded_unasked() -> None:
    pytest.importorskip("pycocoevalcap")
    if (caption_tools.library_folder() / "spice/lib/stanford-corenlp-3.6.0-models.jar").is_file():
        pytest.skip("SPICE's models are installed")
    with pytest.raises(MissingToolError, match="get_stanford_models"):
        caption_scores(**GOOD, metrics=["spice"])


@tools
def test_spice_scores_return_to_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library sorts its images; here it is replaced, because its models are not installed."""
    pytest.importorskip("pycocoevalcap")
    from cmapkd.evaluation import captioning

    class Spice:
        def compute_score(self, references: Any, predictions: Any) -> tuple[float, list[Any]]:
            return 0.5, [{"All": {"f": number}} for number, _ in enumerate(sorted(references))]

    monkeypatch.setattr(captioning, "_check_spice_models", lambda folder: None)
    monkeypatch.setattr(captioning, "_library", lambda module, name: Spice)
    scores = caption_scores({"b": "x", "a": "y"}, {"b": ["x"], "a": ["y"]}, metrics=["spice"])
    assert scores.corpus == {"spice": 0.5}
    assert scores.per_image == {"spice": {"a": 0, "b": 1}}


def test_a_tokeniser_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho no memory left >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(caption_tools, "java", lambda: str(program))
    with pytest.raises(RuntimeError, match=r"(?s)returned 0 lines for 1 captions, exit status 3.*no memory left"):
        tokenise({"a": ["a cat"]})
    with pytest.raises(RuntimeError, match=r"METEOR stopped without an answer"):
        caption_tools.meteor({"a": ["a cat"]}, {"a": ["a cat"]})


def test_clip_score_is_its_definition() -> None:
    draws = torch.Generator().manual_seed(0)
    images, captions = torch.randn(6, 5, generator=draws), torch.randn(6, 5, generator=draws)
    references = torch.randn(14, 5, generator=draws)
    pair = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 3, 3, 3, 5, 5, 5])
    scores = clip_scores(images, captions, references=references, pair_of_reference=pair)

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    assert scores.ref_clip_score is not None
    for i in range(6):
        score = 2.5 * max(cosine(images[i], captions[i]), 0)
        nearest = max(0, *(cosine(captions[i], references[r]) for r in range(14) if pair[r] == i))
        harmonic = 2 * score * nearest / (score + nearest) if score and nearest else 0
        assert scores.clip_score[i] == pytest.approx(score, abs=1e-6)
        assert scores.ref_clip_score[i] == pytest.approx(harmonic, abs=1e-6)
    assert scores.to_dict() == pytest.approx(
        {"clip_score": float(scores.clip_score.mean()), "ref_clip_score": float(scores.ref_clip_score.mean())}
    )
    assert set(clip_scores(images, captions).to_dict()) == {"clip_score"}


def test_clip_score_ignores_length_and_ends_at_two_and_a_half() -> None:
    rows = torch.tensor([[1.0, 0], [0, 3], [-1, 0]])
    other = torch.tensor([[5.0, 0], [4, 0], [2, 0]])
    assert clip_scores(rows, other).clip_score.tolist() == [2.5, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": torch.ones(3, 4)}, "one image embedding for each caption"),
        ({"images": torch.ones(0, 4), "captions": torch.ones(0, 4)}, "at least one pair"),
        ({"images": torch.full((2, 4), torch.nan)}, "2 of 2 image embeddings are not finite"),
        (
            {"captions": torch.tensor([[1.0] * 4, [0.0] * 4])},
            "1 of 2 caption embeddings are all zero, the first at row 1",
        ),
        ({"references": torch.ones(3, 4)}, "pair_of_reference must name the pair of each of the 3"),
        ({"references": torch.ones(2, 4), "pair_of_reference": torch.tensor([0, 0])}, "such as pair 1"),
        ({"references": torch.ones(3, 4), "pair_of_reference": torch.tensor([0, 1, 2])}, "such as pair 2"),
    ],
)
def test_clip_score_wrong_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_scores(**({"images": torch.ones(2, 4), "captions": torch.ones(2, 4)} | changes))

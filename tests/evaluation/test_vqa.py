"""VQA accuracy and answer normalisation, against the reference tool's output and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cmapkd.evaluation.vqa import normalise_answer, strip_punctuation, vqa_accuracy, vqa_scores


def test_normalisation_lines_of_the_reference(shared: Path) -> None:
    lines = (shared / "metric_parity" / "vqa_normalise.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 862
    for line in map(json.loads, lines):
        assert strip_punctuation(line["in"]) == line["punctuation"], line
        assert normalise_answer(line["in"]) == line["out"], line


def test_accuracies_of_the_reference(shared: Path) -> None:
    folder = shared / "metric_parity"
    annotations = json.loads((folder / "vqa_nlvr_votes_annotations.json").read_text())["annotations"]
    results = json.loads((folder / "vqa_nlvr_votes_results.json").read_text())
    expected = json.loads((folder / "vqa_nlvr_votes.expected.json").read_text())
    scores = vqa_scores(
        {str(result["question_id"]): result["answer"] for result in results},
        {str(a["question_id"]): [answer["answer"] for answer in a["answers"]] for a in annotations},
        kinds={str(a["question_id"]): a["answer_type"] for a in annotations},
        question_types={str(a["question_id"]): a["question_type"] for a in annotations},
    )
    digits = 0.5e-4  # the reference rounds to four decimals
    assert scores.overall == pytest.approx(expected["accuracy"]["overall"], abs=digits)
    assert scores.by_kind == pytest.approx(expected["accuracy"]["perAnswerType"], abs=digits)
    assert scores.by_question_type == pytest.approx(expected["accuracy"]["perQuestionType"], abs=digits)
    assert scores.per_question == pytest.approx(expected["per_question"], abs=digits)
    assert (scores.num_missing, scores.num_few_answers) == (0, 0)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The two  cats.", "2 cats"),
        ("None", "0"),
        ("wont", "won't"),
        ("yalldve", "yalldve"),  # two apostrophes short: not repaired
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),  # as the reference has it
        ("1,000,000", "1000000"),
        ("red/green", "red green"),
        ("red /green", "red green"),
        ("1,5 red/green", "15 redgreen"),  # a comma between digits removes all punctuation
        ("3.5", "3.5"),
        ("it is 3. yes", "it is 3 yes"),
        (". " * 33, "."),  # the reference removes 32 periods
        ("", ""),
    ],
)
def test_normalisation_by_hand(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_ten_annotators(matches: int, accuracy: float) -> None:
    """The familiar 30, 60, 90 and 100 %: the mean over leaving out each annotator."""
    answers = ["Red."] * matches + [f"colour {number}" for number in range(10 - matches)]
    assert vqa_accuracy("red", answers) == pytest.approx(accuracy)


def test_agreeing_annotators_are_compared_as_they_wrote() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1


@pytest.mark.parametrize(
    ("answers", "accuracy"), [(["2"], 1), (["2", "two"], 1), (["3", "the 2"], 1), (["2", "3", "4"], 1), (["3"], 0)]
)
def test_few_answers_are_alternatives(answers: list[str], accuracy: float) -> None:
    assert vqa_accuracy("Two", answers) == accuracy
    assert vqa_scores({"q": "Two"}, {"q": answers}).num_few_answers == 1
    assert vqa_scores({"q": "Two"}, {"q": ["2"] * 4}).num_few_answers == 0


def test_means_apart() -> None:
    scores = vqa_scores(
        {"a": "yes", "b": "3", "c": "red"},
        {"a": ["yes"], "b": ["2"], "c": ["red"]},
        kinds={"a": "yes/no", "b": "number", "c": "other"},
        question_types={"a": "is it", "b": "how many", "c": "how many"},
    )
    assert scores.overall == pytest.approx(200 / 3)
    assert scores.by_kind == {"yes/no": 100, "number": 0, "other": 100}
    assert scores.by_question_type == {"is it": 100, "how many": 50}
    assert scores.per_question == {"a": 100, "b": 0, "c": 100}
    assert json.loads(json.dumps(scores.to_dict()))["num_questions"] == 3


def test_missing_predictions_are_refused_or_counted() -> None:
    answers = {"a": ["yes"], "b": ["no"]}
    with pytest.raises(ValueError, match=r"1 of 2 questions have no prediction, the first 'b'.*missing='wrong'"):
        vqa_scores({"a": "yes"}, answers)
    scores = vqa_scores({"a": "yes"}, answers, missing="wrong")
    assert (scores.overall, scores.num_missing, scores.per_question["b"]) == (50, 1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": {}, "predictions": {}}, "there are no questions"),
        ({"predictions": {"a": "yes", "z": "no"}}, "1 of 2 predictions are for questions without answers.*'z'"),
        ({"answers": {"a": []}}, "'a' has no list of answers"),
        ({"answers": {"a": "yes"}}, "'a' has no list of answers"),
        ({"answers": {"a": [1, 2]}}, "'a' has no list of answers"),
        ({"predictions": {"a": None}}, "prediction for question 'a' is not text"),
        ({"kinds": {}}, "kinds says nothing of 1 of 1 questions"),
        ({"kinds": {"a": "colour"}}, "kinds holds 'colour'"),
        ({"question_types": {"b": "is"}}, "question_types says nothing"),
        ({"missing": "zero"}, "must be 'error' or 'wrong'"),
    ],
)
def test_wrong_input(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"predictions": {"a": "yes"}, "answers": {"a": ["yes"]}} | changes
    with pytest.raises(ValueError, match=message):
        vqa_scores(**arguments)


def test_no_answers_to_one_question() -> None:
    with pytest.raises(ValueError, match="no answers to compare with"):
        vqa_accuracy("yes", [])

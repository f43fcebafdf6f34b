"""Visual question answering by the VQA v2 rules: how answers are normalised, and accuracy against ten annotators."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

KINDS = ("yes/no", "number", "other")
ENOUGH_MATCHES = 3  # annotators that must agree for full credit

_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_BETWEEN_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the reference hands `re.UNICODE`, which is 32, to `sub` as its count

# Right spellings. The reference repairs an answer's word that lacks exactly one of their apostrophes, and no other.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_REPAIRS = {
    right[:place] + right[place + 1 :]: right
    for right in _CONTRACTIONS.split()
    for place, letter in enumerate(right)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one that the reference turns around


@dataclass(frozen=True, slots=True)
class VqaScores:
    """Accuracies in percent.

    Attributes:
        overall: the mean over all questions.
        by_kind: over the questions of each kind of answer (`yes/no`, `number`, `other`) that occurs.
        by_question_type: over the questions of each type, where types were given.
        per_question: of every question, by its id.
        num_missing: questions without a prediction, counted as wrong (only with `missing="wrong"`).
        num_few_answers: questions with fewer than four answers, each of which is right.
    """

    overall: float
    by_kind: dict[str, float]
    by_question_type: dict[str, float]
    per_question: dict[str, float] = field(repr=False)
    num_missing: int
    num_few_answers: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the single questions, ready for JSON."""
        return {
            "overall": self.overall,
            "by_kind": dict(self.by_kind),
            "by_question_type": dict(self.by_question_type),
            "num_questions": len(self.per_question),
            "num_missing": self.num_missing,
            "num_few_answers": self.num_few_answers,
        }


def vqa_scores(
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    *,
    kinds: Mapping[str, str] | None = None,
    question_types: Mapping[str, str] | None = None,
    missing: Literal["error", "wrong"] = "error",
) -> VqaScores:
    """Accuracy of one predicted answer for each question against all its annotators' answers.

    Args:
        predictions: the answer to each question, by question id.
        answers: what the annotators answered, one entry each; VQA v2 has ten.
        kinds: `yes/no`, `number` or `other` of each question, for the accuracies apart.
        question_types: how each question begins (`what color is`), for the same.
        missing: whether a question without a prediction is an error or a wrong answer, which is then counted.
    Raises:
        ValueError: no questions, predictions for unknown questions, questions without answers or without a prediction,
            an answer that is not text, or kinds that do not cover the questions.
    Source: Antol et al. 2015, arXiv:1505.00468, section 3; Goyal et al. 2017 (VQA v2). Equal to
        GT-Vision-Lab/VQA a013f0043c1e, vqaEval.py, to its last digit, wherever questions have four or more answers.
    """
    _check(predictions, answers, kinds, question_types, missing)
    per_question = {
        question: 100 * vqa_accuracy(predictions[question], given) if question in predictions else 0.0
        for question, given in answers.items()
    }
    return VqaScores(
        overall=_mean(list(per_question.values())),
        by_kind=_means(per_question, kinds),
        by_question_type=_means(per_question, question_types),
        per_question=per_question,
        num_missing=len(answers) - len(predictions),
        num_few_answers=sum(len(given) <= ENOUGH_MATCHES for given in answers.values()),
    )


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of one answer in [0, 1]: the mean over the annotators of min(1, matches among the others / 3).

    Prediction and answers are normalised only where the annotators differ, as the reference does: against ten equal
    answers `yes`, `Yes` is wrong. Fewer than four answers are no vote but alternatives, each of which is right once
    normalised; the reference's formula would give a right answer to such questions 67, 33 or 0 %.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("there are no answers to compare with: a question needs at least one annotator's answer.")
    prediction, given = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(given) <= ENOUGH_MATCHES:
        return float(normalise_answer(prediction) in map(normalise_answer, given))
    if len(set(given)) > 1:
        prediction, given = normalise_answer(prediction), [normalise_answer(answer) for answer in given]
    matches = sum(answer == prediction for answer in given)
    credit = [min(1.0, (matches - (answer == prediction)) / ENOUGH_MATCHES) for answer in given]
    return sum(credit) / len(credit)


def normalise_answer(text: str) -> str:
    """An answer as the VQA tool compares it: punctuation, number words, articles and missing apostrophes settled."""
    words = [_DIGITS.get(word, word) for word in strip_punctuation(text).lower().split()]
    return " ".join(_REPAIRS.get(word, word) for word in words if word not in _ARTICLES)


def strip_punctuation(text: str) -> str:
    """Removes punctuation that touches a blank, puts a blank for the rest; removes periods that no digit follows.

    A comma between two digits anywhere in the text makes all its punctuation removed. Apostrophes and colons stay.
    """
    comma = _BETWEEN_DIGITS.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if touches or comma else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _means(per_question: Mapping[str, float], groups: Mapping[str, str] | None) -> dict[str, float]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for question, accuracy in per_question.items() if groups is not None else ():
        assert groups is not None
        values[groups[question]].append(accuracy)
    return {group: _mean(accuracies) for group, accuracies in sorted(values.items())}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _check(
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    kinds: Mapping[str, str] | None,
    question_types: Mapping[str, str] | None,
    missing: str,
) -> None:
    if missing not in ("error", "wrong"):
        raise ValueError(f"missing must be 'error' or 'wrong', got {missing!r}")
    if not answers:
        raise ValueError("there are no questions: give the annotators' answers by question id.")
    if unknown := [question for question in predictions if question not in answers]:
        raise ValueError(
            f"{len(unknown)} of {len(predictions)} predictions are for questions without answers, the first for "
            f"{unknown[0]!r}: predictions and answers must be of the same split, with ids written alike."
        )
    without = [question for question in answers if question not in predictions]
    if without and missing == "error":
        raise ValueError(
            f"{len(without)} of {len(answers)} questions have no prediction, the first {without[0]!r}: answer all of "
            "them, or pass missing='wrong' to count these as wrong."
        )
    for question, given in answers.items():
        if isinstance(given, str) or not given or not all(isinstance(answer, str) for answer in given):
            raise ValueError(f"question {question!r} has no list of answers as text: {str(given)[:60]!r}")
    for question, prediction in predictions.items():
        if not isinstance(prediction, str):
            raise ValueError(f"the prediction for question {question!r} is not text: {str(prediction)[:60]!r}")
    for name, groups in (("kinds", kinds), ("question_types", question_types)):
        if groups is not None and (uncovered := [question for question in answers if question not in groups]):
            raise ValueError(
                f"{name} says nothing of {len(uncovered)} of {len(answers)} questions, the first {uncovered[0]!r}"
            )
    if kinds is not None and (odd := sorted({kinds[question] for question in answers} - set(KINDS))):
        raise ValueError(f"kinds holds {odd[0]!r}: the kinds of answers are {', '.join(KINDS)}.")

"""Task `yes_no`: questions whose answer is yes or no, scored as POPE does, and by the odds of the first token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from cmapkd.data.dialogues import ChatItem
from cmapkd.data.prompting import commonest
from cmapkd.evaluation.answer_scores import AnswerScore
from cmapkd.evaluation.dialogues import Asked, lacking, questions
from cmapkd.evaluation.subject import Bench, Subject
from cmapkd.evaluation.tasks.base import Column, Task
from cmapkd.evaluation.token_scores import first_log_odds
from cmapkd.evaluation.writing import Writer
from cmapkd.evaluation.yes_no import YesNoScores, is_clear, is_yes
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.yes_no import first_tokens


class YesNo(Task):
    title = "Yes-no questions as POPE scores them, in percent"
    reads = GenerativeModel
    alone = automatic = True
    columns = (
        Column("accuracy", ("accuracy",)),
        Column("precision", ("precision",)),
        Column("recall", ("recall",)),
        Column("F1", ("f1",)),
        Column("mean F1 of categories", ("mean_f1",)),
        Column("says yes", ("yes_ratio",)),
        Column("unclear", ("unclear",)),
        Column("accuracy by odds", ("by_odds", "accuracy")),
        Column("F1 by odds", ("by_odds", "f1")),
        Column("of questions", ("num_questions",), 0),
    )

    def missing(self, subject: Subject) -> str | None:
        bench = subject.bench
        return (
            None
            if _asked(bench)
            else lacking(bench.annotations, bench.how, "a yes/no question whose answer is yes or no")
        )

    def score(self, subject: Subject) -> dict[str, Any]:
        bench, writer, how = subject.bench, subject.writer, subject.bench.how
        asked = _asked(bench)
        bench.say(f"{subject.name}: {len(asked):,} yes-no questions of {bench.scored.name}")
        answers = writer.written(asked, most=how.answer_tokens)
        known = [each for each, answer in zip(asked, answers, strict=True) if answer is not None]
        said = [answer.text for answer in answers if answer is not None]
        right = [_is_right(each) for each in known]
        yes = [is_yes(text) for text in said]
        unclear = [not is_clear(text) for text in said]
        strict = [a == b and not odd for a, b, odd in zip(yes, right, unclear, strict=True)]
        subject.answers["yes_no.accuracy"] = AnswerScore.of(
            known, [100.0 * (a == b) for a, b in zip(yes, right, strict=True)]
        )
        by_category = {name: _of(places, yes, right) for name, places in _categories(known).items()}
        return YesNoScores.of(yes, right).to_dict() | {
            "unclear": 100 * sum(unclear) / len(unclear),
            "num_unclear": sum(unclear),
            "accuracy_strict": 100 * sum(strict) / len(strict),
            "by_category": by_category,
            "mean_f1": _mean([scores["f1"] for scores in by_category.values()]),
            "by_odds": _by_odds(writer, known, right),
            "num_not_asked": len(asked) - len(known),
            "protocol": writer.protocol(max_new_tokens=how.answer_tokens, question_suffix=how.question_suffix),
        }


def _asked(bench: Bench) -> list[Asked]:
    """The questions of kind yes/no; those whose commonest answer is neither are left out, as nobody can score them."""
    every = questions(bench.annotations, bench.how)
    of_kind = [each for each in every if each.question is not None and each.question.kind == "yes/no"]
    return [each for each in of_kind if _commonest(each) in ("yes", "no")]


def _commonest(asked: Asked) -> str:
    return commonest(asked.references).strip().lower()


def _is_right(asked: Asked) -> bool:
    """Whether yes is the answer."""
    return _commonest(asked) == "yes"


def _categories(asked: Sequence[Asked]) -> dict[str, list[int]]:
    """Places by category, of the questions that have one."""
    places: dict[str, list[int]] = {}
    for place, each in enumerate(asked):
        if each.question is not None and each.question.category is not None:
            places.setdefault(each.question.category, []).append(place)
    return dict(sorted(places.items()))


def _of(places: Sequence[int], yes: Sequence[bool], right: Sequence[bool]) -> dict[str, Any]:
    return YesNoScores.of([yes[place] for place in places], [right[place] for place in places]).to_dict()


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _by_odds(writer: Writer, asked: Sequence[Asked], right: Sequence[bool]) -> dict[str, Any] | None:
    """The same scores where yes is said if its first token is likelier; None where yes and no begin alike."""
    tokens = first_tokens(writer.model)
    if tokens is None:
        return None
    log_odds = partial(_log_odds, yes=tokens["yes"], no=tokens["no"])
    found = writer.computed(log_odds, asked, [each.unread() for each in asked])
    odds = torch.tensor([found.get(place, 0.0) for place in range(len(asked))])
    said = (odds > 0).tolist()
    scores = YesNoScores.of(said, right).to_dict()
    margins = torch.where(torch.tensor(right), odds, -odds)
    return scores | {"mean_margin": float(margins.double().mean())}  # nats in favour of the right answer


def _log_odds(writer: Writer, items: Sequence[ChatItem], *, yes: Sequence[int], no: Sequence[int]) -> list[float]:
    first = [torch.tensor(ids, device=writer.device) for ids in (yes, no)]
    odds: list[float] = first_log_odds(writer.model, writer.features(items), *first).tolist()
    return odds

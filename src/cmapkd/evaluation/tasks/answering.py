"""Task `answering`: a model that writes answers the source's questions, scored by the VQA rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmapkd.data.prompting import commonest
from cmapkd.evaluation.answer_scores import AnswerScore
from cmapkd.evaluation.dialogues import Asked, lacking, questions
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Headline, Task
from cmapkd.evaluation.vqa import VqaScores, normalise_answer, vqa_scores
from cmapkd.models.generative import GenerativeModel


class Answering(Task):
    title = "Question answering, accuracy in percent"
    reads = GenerativeModel
    alone = automatic = True
    headline = Headline("answering", ("overall",), "answers")
    columns = (
        Column("overall", ("overall",)),
        Column("yes/no", ("by_kind", "yes/no")),
        Column("number", ("by_kind", "number")),
        Column("other", ("by_kind", "other")),
        Column("exact match", ("exact",)),
        Column("always the commonest", ("prior",)),
        Column("without an end %", ("unended",)),
        Column("of questions", ("num_questions",), 0),
    )

    def missing(self, subject: Subject) -> str | None:
        bench = subject.bench
        return (
            None
            if questions(bench.annotations, bench.how)
            else lacking(bench.annotations, bench.how, "a question with an answer")
        )

    def score(self, subject: Subject) -> dict[str, Any]:
        """Greedy answers. The prior gives every scored question the answer that is right most often."""
        bench, writer = subject.bench, subject.writer
        how = bench.how
        asked = questions(bench.annotations, how)
        bench.say(f"{subject.name}: answering {len(asked):,} questions of {bench.scored.name}")
        answers = writer.written(asked, most=how.answer_tokens)
        pairs = [(each, answer) for each, answer in zip(asked, answers, strict=True) if answer is not None]
        known = [each for each, _ in pairs]
        said = [answer.text for _, answer in pairs]
        usual = commonest([normalise_answer(commonest(each.references)) for each in known])
        exact = [
            normalise_answer(text) in {normalise_answer(right) for right in each.references}
            for each, text in zip(known, said, strict=True)
        ]
        scores = _accuracies(known, said)
        subject.answers["answering.overall"] = AnswerScore.of(known, list(scores.per_question.values()))
        subject.answers["answering.exact"] = AnswerScore.of(known, [100.0 * right for right in exact])
        return {
            "overall": scores.overall,
            "by_kind": scores.by_kind,
            "exact": 100 * sum(exact) / len(exact),
            "prior": _accuracies(known, [usual] * len(known)).overall,
            "commonest": usual,
            "unended": 100 * sum(not answer.ended for _, answer in pairs) / len(pairs),
            "empty": 100 * sum(not text for text in said) / len(said),
            "num_questions": len(known),
            "num_not_asked": len(asked) - len(known),
            "protocol": writer.protocol(max_new_tokens=how.answer_tokens, question_suffix=how.question_suffix),
        }


def _accuracies(asked: Sequence[Asked], said: Sequence[str]) -> VqaScores:
    numbered = {str(number): each for number, each in enumerate(asked)}
    kinds = {number: each.question.kind for number, each in numbered.items() if each.question is not None}
    return vqa_scores(
        dict(zip(numbered, said, strict=True)),
        {number: each.references for number, each in numbered.items()},
        kinds=kinds,
    )

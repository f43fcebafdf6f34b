"""Task `drafting`: each model that writes as a draft of the first, its teacher, in speculative decoding."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from cmapkd.data.dialogues import ChatItem
from cmapkd.evaluation.answer_scores import AnswerScore
from cmapkd.evaluation.dialogues import Asked, descriptions, lacking, questions
from cmapkd.evaluation.drafting import Comparison, DraftingConfig, compare_texts, summary
from cmapkd.evaluation.subject import Bench, Subject
from cmapkd.evaluation.tasks.base import Column, Task
from cmapkd.evaluation.writing import NothingReadError, read_by_all
from cmapkd.models.drafting import why_no_draft
from cmapkd.models.generative import Decoding, GenerativeModel


class Drafting(Task):
    title = "As a draft of the first model"
    reads = GenerativeModel
    Settings = DraftingConfig
    settings: DraftingConfig
    alone = needs_reference = True
    columns = (
        Column("tokens a pass of the teacher", ("accepted_length",), 2),
        Column("of proposed tokens stayed, %", ("accepted_share",)),
        Column("texts that are the teacher's own, %", ("same_texts",)),
        Column("speed x", ("speed",), 2),
        Column("of texts", ("num_texts",), 0),
    )

    def missing(self, subject: Subject) -> str | None:
        bench = subject.bench
        return None if _asked(bench) else lacking(bench.annotations, bench.how, "a caption, a question or a dialogue")

    def unlike(self, subjects: Sequence[Subject]) -> str | None:
        teacher = subjects[0].generative
        return next(filter(None, (why_no_draft(teacher, each.generative) for each in subjects[1:])), None)

    def measure(self, subjects: Sequence[Subject], bench: Bench) -> list[dict[str, Any]]:
        """The first model, which all others draft for, has no numbers of its own. All read what all can read."""
        asked, proposals = _asked(bench)[: self.settings.samples], self.settings.proposals
        bench.say(f"writing {len(asked)} texts about {bench.scored.name}, with each of {len(subjects) - 1} as a draft")
        read: list[Asked] = []
        found: list[list[Comparison]] = []
        with ExitStack() as computing:
            for subject in subjects:
                computing.enter_context(subject.writer.computing())
            for places, items in read_by_all([each.writer for each in subjects], asked, [e.unread() for e in asked]):
                for place, of_models in zip(places, zip(*items, strict=True), strict=True):
                    if not read:  # what comes first takes longer
                        _compared(subjects, of_models, asked[place], bench, proposals)
                    read.append(asked[place])
                    found.append(_compared(subjects, of_models, asked[place], bench, proposals))
        if not found:
            raise NothingReadError(f"no dialogue of {bench.scored.name} could be read by all models")
        how = {
            "proposals": proposals,
            "most_tokens": _most(read[0], bench),
            "precision": subjects[0].writer.precision,
            "instruction": bench.how.instruction,
        }
        counts = {"teacher": subjects[0].name, "num_not_asked": len(asked) - len(read), "protocol": how}
        results: list[dict[str, Any]] = [dict(counts)]
        for subject, of_draft in zip(subjects[1:], zip(*found, strict=True), strict=True):
            passes, tokens = [float(each.passes) for each in of_draft], [float(each.tokens) for each in of_draft]
            subject.answers["drafting.passes_per_token"] = AnswerScore.of(read, passes, tokens)
            results.append(summary(of_draft) | counts)
        return results


def _asked(bench: Bench) -> list[Asked]:
    """Descriptions, which are long; of a source without captions, or asked for others alone, answers."""
    return descriptions(bench.annotations, bench.how) or questions(bench.annotations, bench.how)


def _most(asked: Asked, bench: Bench) -> int:
    return bench.how.caption_tokens if asked.kind == "description" else bench.how.answer_tokens


def _compared(
    subjects: Sequence[Subject], items: Sequence[ChatItem], asked: Asked, bench: Bench, proposals: int
) -> list[Comparison]:
    """One dialogue, written with each draft."""
    teacher, *drafts = (
        (subject.generative, subject.writer.joined([item])) for subject, item in zip(subjects, items, strict=True)
    )
    return compare_texts(*teacher, drafts, Decoding(max_new_tokens=_most(asked, bench)), proposals=proposals)

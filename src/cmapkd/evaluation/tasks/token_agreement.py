"""Task `token_agreement`: each model that writes against the first, its teacher, token by token on references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmapkd.data.dialogues import ChatItem
from cmapkd.evaluation.dialogues import references
from cmapkd.evaluation.subject import Bench, Subject
from cmapkd.evaluation.tasks.base import Column, Task
from cmapkd.evaluation.tasks.perplexity import nothing_to_read
from cmapkd.evaluation.token_scores import Agreement, token_agreement
from cmapkd.evaluation.writing import NothingReadError, read_by_all
from cmapkd.models.generative import GenerativeModel


class TokenAgreement(Task):
    title = "Agreement with the first model, by token"
    reads = GenerativeModel
    needs_reference = True
    columns = (
        Column("same likeliest token %", ("top1",)),
        Column("KL from the first, nats", ("kl",), 4),
        Column("of tokens", ("num_tokens",), 0),
    )

    def missing(self, subject: Subject) -> str | None:
        return nothing_to_read(subject)

    def unlike(self, subjects: Sequence[Subject]) -> str | None:
        """Models whose tokens differ are not compared: their probabilities are of different things. So are those of
        models that begin or end an answer otherwise."""
        teacher = subjects[0]
        for subject in subjects[1:]:
            theirs, own = teacher.generative.vocabulary, subject.generative.vocabulary
            if (theirs.size, theirs.digest) != (own.size, own.digest):
                return (
                    f"it compares models with the same vocabulary: {teacher.name} has {theirs.size:,} tokens "
                    f"({theirs.digest[:8]}), {subject.name} {own.size:,} ({own.digest[:8]}). Compare their bits per "
                    "byte instead (perplexity)"
                )
            if (theirs.end_ids[0], theirs.lead) != (own.end_ids[0], own.lead):
                return (
                    f"it compares answers of the same tokens: {teacher.name} begins them with {theirs.lead!r} and ends "
                    f"them with token {theirs.end_ids[0]}, {subject.name} with {own.lead!r} and {own.end_ids[0]}. "
                    "Compare their bits per byte instead (perplexity)"
                )
        return None

    def measure(self, subjects: Sequence[Subject], bench: Bench) -> list[dict[str, Any]]:
        """The first model's own row is what perfect agreement looks like. All read the dialogues that all can read."""
        asked = references(bench.annotations, bench.how)
        bench.say(f"comparing {len(subjects)} models on {len(asked):,} references of {bench.scored.name}")
        sums, num_read = [Agreement() for _ in subjects], 0
        writers = [subject.writer for subject in subjects]
        for places, items in read_by_all(writers, asked, [each.dialogue for each in asked]):
            num_read += len(places)
            found = _compare(subjects, items)
            sums = [each.plus(more) for each, more in zip(sums, found, strict=True)]
        if not num_read:
            raise NothingReadError(f"no dialogue of {bench.scored.name} could be read by all models")
        counts = {"num_references": num_read, "num_not_asked": len(asked) - num_read}
        return [
            {"teacher": subjects[0].name, "top1": 100 * each.same / each.tokens, "kl": each.divergence / each.tokens}
            | {"num_tokens": each.tokens, "protocol": subject.writer.protocol()}
            | counts
            for each, subject in zip(sums, subjects, strict=True)
        ]


def _compare(subjects: Sequence[Subject], items: Sequence[Sequence[ChatItem]]) -> list[Agreement]:
    """Each model against the first on one batch, which each reads in its own form."""
    teacher = subjects[0]
    with teacher.writer.computing():
        theirs = teacher.writer.features(items[0])
    found = []
    for subject, own_items in zip(subjects, items, strict=True):
        with subject.writer.computing():
            own = theirs if subject is teacher else subject.writer.features(own_items)
            found.append(token_agreement(teacher.generative, theirs, subject.generative, own))
    return found

"""Task `perplexity`: how likely the source's answers or captions are to a model that writes, given the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cmapkd.evaluation.dialogues import Asked, other_pictures, references
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Headline, Task
from cmapkd.evaluation.token_scores import negative_log_likelihoods
from cmapkd.evaluation.writing import Writer
from cmapkd.models.generative import GenerativeModel


class Perplexity(Task):
    title = "Likelihood of references (lower is better)"
    reads = GenerativeModel
    alone = automatic = True
    headline = Headline("negative_bits_per_byte", ("negative_bits_per_byte",), "-bits/byte", 3, "bits per byte")
    columns = (
        Column("perplexity of a token", ("perplexity",), 3),
        Column("bits per byte", ("bits_per_byte",), 3),
        Column("with a wrong picture", ("wrong_picture", "bits_per_byte"), 3),
        Column("visual gain, bits/byte", ("visual_gain",), 3),
        Column("of references", ("num_references",), 0),
    )

    def missing(self, subject: Subject) -> str | None:
        return nothing_to_read(subject)

    def score(self, subject: Subject) -> dict[str, Any]:
        """With each picture, and with another sample's: what the right picture is worth is the `visual_gain`."""
        bench, writer, how = subject.bench, subject.writer, subject.bench.how
        asked = references(bench.annotations, how)
        if not asked:
            raise ValueError(f"{bench.scored.name} has neither a question with an answer nor a caption")
        bench.say(f"{subject.name}: reading {len(asked):,} references of {bench.scored.name}")
        own = _read(writer, asked)
        scores = own.to_dict()
        result = scores | {
            # steps are chosen by the highest number
            "negative_bits_per_byte": -scores["bits_per_byte"],
            "num_references": own.references,
            "num_not_asked": len(asked) - own.references,
            "of": "captions" if asked[0].kind == "caption" else "questions",
            "protocol": writer.protocol(question_suffix=how.question_suffix, instruction=how.instruction),
        }
        if (pictures := other_pictures(asked)) is None:
            return result
        wrong = _read(writer, asked, pictures).to_dict()
        return result | {
            "wrong_picture": wrong,
            "visual_gain": wrong["bits_per_byte"] - scores["bits_per_byte"],
        }


class _Sums(NamedTuple):
    nats: float
    tokens: int
    num_bytes: int
    references: int

    def to_dict(self) -> dict[str, Any]:
        """Sums over tokens divided once: long references count for more. End tokens are tokens, and have no bytes."""
        per_token = self.nats / self.tokens
        return {
            "nll": per_token,
            "perplexity": math.exp(min(per_token, 700)),  # beyond is no float
            "bits_per_byte": self.nats / math.log(2) / self.num_bytes,
            "num_tokens": self.tokens,
            "num_bytes": self.num_bytes,
        }


def nothing_to_read(subject: Subject) -> str | None:
    """Why the source has no reference, or None; judged by its first samples."""
    first = subject.bench.first_samples
    if any(each.turns or each.captions or any(asked.answers for asked in each.questions) for each in first):
        return None
    return f"none of its first {len(first)} samples has a dialogue, a question with an answer, or a caption"


def _read(writer: Writer, asked: Sequence[Asked], pictures: Sequence[int] | None = None) -> _Sums:
    nats, tokens, num_bytes, count = 0.0, 0, 0, 0
    for places, items in writer.batches(asked, [each.dialogue for each in asked], pictures):
        with writer.computing():
            losses = negative_log_likelihoods(writer.model, writer.features(items))
        nats += float(losses.sum())
        tokens += len(losses)
        num_bytes += sum(asked[place].num_bytes for place in places)
        count += len(places)
    return _Sums(nats, tokens, num_bytes, count)

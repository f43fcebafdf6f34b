"""Task `perplexity`: how likely the source's answers or captions are to a model that writes, given the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from cmapkd.data.dialogues import ChatItem
from cmapkd.evaluation.answer_scores import AnswerScore
from cmapkd.evaluation.dialogues import Asked, lacking, other_pictures, references
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Headline, Task
from cmapkd.evaluation.token_scores import answer_rows, negative_log_likelihoods
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
        bench.say(f"{subject.name}: reading {len(asked):,} references of {bench.scored.name}")
        read = _read(writer, asked)
        scores = _sum(read.values()).to_dict()
        known, sizes = [asked[place] for place in read], [each.num_bytes for each in read.values()]
        bits = [each.nats / math.log(2) for each in read.values()]
        subject.answers["perplexity.bits_per_byte"] = AnswerScore.of(known, bits, sizes)
        subject.answers["perplexity.negative_bits_per_byte"] = AnswerScore.of(known, [-each for each in bits], sizes)
        result = scores | {
            # steps are chosen by the highest number
            "negative_bits_per_byte": -scores["bits_per_byte"],
            "num_references": len(read),
            "num_not_asked": len(asked) - len(read),
            "of": "captions" if asked[0].kind == "caption" else "questions",
            "protocol": writer.protocol(question_suffix=how.question_suffix, instruction=how.instruction),
        }
        shown = [place for place, each in enumerate(asked) if each.shows]
        pictures = other_pictures([asked[place] for place in shown])
        wrong_read = {} if pictures is None else _read(writer, [asked[place] for place in shown], pictures)
        other = {shown[place]: sums for place, sums in wrong_read.items()}
        both = read.keys() & other.keys()  # another picture may make a dialogue too long
        if not both:
            return result
        wrong, right = (_sum(each[place] for place in sorted(both)).to_dict() for each in (other, read))
        return result | {
            "wrong_picture": wrong | {"num_references": len(both)},
            "visual_gain": wrong["bits_per_byte"] - right["bits_per_byte"],
        }


class _Sums(NamedTuple):
    nats: float
    tokens: int
    num_bytes: int

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
    """Why the source has no reference, or None."""
    bench = subject.bench
    if references(bench.annotations, bench.how):
        return None
    return lacking(bench.annotations, bench.how, "a dialogue, a question with an answer, or a caption")


def _read(writer: Writer, asked: Sequence[Asked], pictures: Sequence[int] | None = None) -> dict[int, _Sums]:
    """By place, of the references that can be read."""
    read = writer.computed(_nats_and_tokens, asked, [each.dialogue for each in asked], pictures)
    return {place: _Sums(nats, tokens, asked[place].num_bytes) for place, (nats, tokens) in read.items()}


def _nats_and_tokens(writer: Writer, items: Sequence[ChatItem]) -> list[tuple[float, int]]:
    """Of the answers of each dialogue."""
    features = writer.features(items)
    losses = negative_log_likelihoods(writer.model, features)
    row_of = answer_rows(features).sample
    nats = losses.new_zeros(len(items)).index_add(0, row_of, losses)
    return [*zip(nats.tolist(), row_of.bincount(minlength=len(items)).tolist(), strict=True)]


def _sum(parts: Iterable[_Sums]) -> _Sums:
    nats, tokens, num_bytes = zip(*parts, strict=True)
    return _Sums(math.fsum(nats), sum(tokens), sum(num_bytes))

"""What is kept of the candidates: small functions of a candidate's answers, each with its settings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field

from cmapkd.config import Config
from cmapkd.engine.candidates import Candidate
from cmapkd.engine.critics import CriticConfig, judge
from cmapkd.engine.one_of import OneOf
from cmapkd.engine.written import Panel
from cmapkd.evaluation.vqa import normalise_answer

_BLANKS, _OTHER_SIGNS = re.compile(r"\s+"), re.compile(r"\W+")

Match = Literal["contained", "equal"]
_ABOUT_MATCH = (
    "contained: the answer's letters and digits stand in the model's, as published; equal: both are the same answer by "
    "the rules of VQA v2."
)


class ParityConfig(Config):
    """Kept where the large model gives the candidate's answer and the small one does not.

    Source: MPA (EMNLP 2025), `Parity_Identifier` of vl2g/MPA@4e69e39.
    """

    right: str = Field(description="A name under answers: those of the large model.")
    wrong: str = Field(description="A name under answers: those of the small model.")
    match: Match = Field("contained", description=_ABOUT_MATCH)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the answers that it reads; so for each filter."""
        return (self.right, self.wrong)


class RightConfig(Config):
    """Kept where a model gives the candidate's answer: one half of parity, or a check of the answer by itself."""

    by: str = Field(description="A name under answers.")
    match: Match = Field("contained", description=_ABOUT_MATCH)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.by,)


class MajorityConfig(Config):
    """The commonest of all drafts becomes the answer; kept where enough of them say it.

    Source: Zooming without Zooming (arXiv:2602.11858); its consistency score, with the rules of VQA v2 in the place of
    a language model that groups answers.
    """

    of: tuple[str, ...] = Field(min_length=1, description="Names under answers, whose drafts vote together.")
    share: float = Field(0.75, gt=0, le=1, description="Least share of all drafts that say the commonest answer.")

    @property
    def reads(self) -> tuple[str, ...]:
        return self.of


class HardConfig(Config):
    """Kept where few drafts of a model are right: what it can do already is left out.

    Source: Zooming without Zooming (arXiv:2602.11858): dropped where 2 of 4 are right.
    """

    by: str = Field(description="A name under answers.")
    most: int = Field(1, ge=0, description="Most drafts that may be right.")
    match: Match = Field("equal", description=_ABOUT_MATCH)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.by,)


class LabelConfig(Config):
    """Kept where the answer is one of those that the data give to the question; without any it is dropped.

    Source: Visual Program Distillation (CVPR 2024, arXiv:2312.03052), which keeps programs that give the label.
    """

    match: Match = Field("equal", description=_ABOUT_MATCH)


class AgreeConfig(Config):
    """Kept where several ways to one question give the answer. Ways that give another one are dropped.

    Equal answers are counted by the rules of VQA v2. Ways without an answer do not count at all.

    Source: SDRT (arXiv:2503.01754), whose prompts answer together; its weights of prompts were not found.
    """

    ways: int = Field(2, ge=2, description="Least number of ways that give the answer.")
    share: float = Field(0.5, gt=0, le=1, description="Least share of the question's ways that give it.")


class FirstConfig(Config):
    """Kept are the first candidates of each question; the random control has no more of a question either."""

    number: int = Field(1, ge=1, description="So many of each question.")


class FilterConfig(OneOf):
    """One filter; exactly one of these is set."""

    parity: ParityConfig | None = Field(None, description="The large model is right, and the small one is wrong.")
    right: RightConfig | None = Field(None, description="A model is right.")
    majority: MajorityConfig | None = Field(None, description="Drafts agree. Gives the answer.")
    hard: HardConfig | None = Field(None, description="A model is seldom right.")
    critic: CriticConfig | None = Field(None, description="A model finds the statement of a fact true.")
    label: LabelConfig | None = Field(None, description="The data give this answer.")
    agree: AgreeConfig | None = Field(None, description="Several programs give this answer.")
    first: FirstConfig | None = Field(None, description="The first candidates of each question.")

    @property
    def answers(self) -> tuple[str, ...]:
        """Names of the answers that it reads."""
        return tuple(getattr(getattr(self, self.kind), "reads", ()))

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that it asks itself."""
        return () if self.critic is None else (self.critic.by,)


def verify(candidates: Sequence[Candidate], config: FilterConfig, label: str, panel: Panel) -> None:
    """Drops those of `candidates` that the filter does not keep; the answers that it reads are there.

    Args:
        label: under which candidates are dropped, and scores are noted.
    """
    keeps = _KINDS[config.kind](candidates, getattr(config, config.kind), label, panel)
    for each, kept in zip(candidates, keeps, strict=True):
        if not kept:
            each.dropped = label


def _parity(candidates: Sequence[Candidate], config: ParityConfig, *_: object) -> list[bool]:
    return [
        parity(each.answer or "", each.answers[config.right][0], each.answers[config.wrong][0], match=config.match)
        for each in candidates
    ]


def _right(candidates: Sequence[Candidate], config: RightConfig, *_: object) -> list[bool]:
    return [says(each.answers[config.by][0], each.answer or "", match=config.match) for each in candidates]


def _majority(candidates: Sequence[Candidate], config: MajorityConfig, label: str, panel: Panel) -> list[bool]:
    kept = []
    for each in candidates:
        drafts = [draft for name in config.of for draft in each.answers[name]]
        each.answer, share = majority([draft if panel.readable(draft) else "" for draft in drafts])
        each.scores[label] = share
        kept.append(each.answer is not None and share >= config.share)
    return kept


def _hard(candidates: Sequence[Candidate], config: HardConfig, label: str, _: object) -> list[bool]:
    kept = []
    for each in candidates:
        right = sum(says(draft, each.answer or "", match=config.match) for draft in each.answers[config.by])
        each.scores[label] = float(right)
        kept.append(right <= config.most)
    return kept


def _critic(candidates: Sequence[Candidate], config: CriticConfig, label: str, panel: Panel) -> list[bool]:
    scores = judge(candidates, config, panel)
    for each, score in zip(candidates, scores, strict=True):
        each.scores[label] = score
    return [config.keeps(each.relation, score) for each, score in zip(candidates, scores, strict=True)]


def _label(candidates: Sequence[Candidate], config: LabelConfig, *_: object) -> list[bool]:
    def right(answer: str, label: str) -> bool:
        known = letters(label) if config.match == "contained" else label.strip()
        return bool(known) and says(answer, label, match=config.match)

    return [any(right(each.answer or "", label) for label in each.accepted) for each in candidates]


def _agree(candidates: Sequence[Candidate], config: AgreeConfig, label: str, _: object) -> list[bool]:
    groups: dict[tuple[object, ...], list[str]] = {}
    for each in candidates:
        groups.setdefault(_question_of(each), []).append(normalise_answer(each.answer or ""))
    kept = []
    for each in candidates:
        said = groups[_question_of(each)]
        counts = Counter(said)
        own = normalise_answer(each.answer or "")
        each.scores[label] = counts[own] / len(said)
        commonest = own == max(counts, key=counts.__getitem__)  # of equals the one of the first way
        kept.append(commonest and counts[own] >= config.ways and each.scores[label] >= config.share)
    return kept


def _first(candidates: Sequence[Candidate], config: FirstConfig, *_: object) -> list[bool]:
    seen = Counter[tuple[object, ...]]()
    kept = []
    for each in candidates:
        kept.append(seen[_question_of(each)] < config.number)
        seen[_question_of(each)] += 1
    return kept


def _question_of(candidate: Candidate) -> tuple[object, ...]:
    return candidate.index, candidate.box, candidate.question


_KINDS: dict[str, Callable[[Sequence[Candidate], Any, str, Panel], list[bool]]] = {
    "parity": _parity,
    "right": _right,
    "majority": _majority,
    "hard": _hard,
    "critic": _critic,
    "label": _label,
    "agree": _agree,
    "first": _first,
}


def parity(answer: str, large: str, small: str, *, match: Match = "contained") -> bool:
    """Whether the large model's text says the answer and the small one's does not."""
    return says(large, answer, match=match) and not says(small, answer, match=match)


def says(text: str, answer: str, *, match: Match) -> bool:
    """Whether a model's text says an answer; an answer without letters and digits is contained in every text."""
    if match == "equal":
        return normalise_answer(text) == normalise_answer(answer)
    return letters(answer) in letters(text)


def letters(text: str) -> str:
    """Lower case, without blanks and signs; an underscore stays.

    Source: `preprocess` of vl2g/MPA@4e69e39, scripts/utils/utils.py.
    """
    return _OTHER_SIGNS.sub("", _BLANKS.sub("", text.lower()))


def majority(drafts: Sequence[str]) -> tuple[str | None, float]:
    """The commonest answer, in its first wording, and the share of drafts that say it.

    Of equally common ones the first. An empty answer is no answer, but its draft counts among all.

    Returns:
        None and 0 where no draft says anything.
    """
    said = [normalise_answer(draft) for draft in drafts]
    counts = Counter(each for each in said if each)
    if not counts:
        return None, 0.0
    commonest = max(counts, key=counts.__getitem__)  # of equals the one that was met first
    return drafts[said.index(commonest)], counts[commonest] / len(drafts)

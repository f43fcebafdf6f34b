"""Yes-no questions by the rules of POPE: how an answer is read, and accuracy, precision, recall, F1 and yes-ratio."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_DENIALS = frozenset({"No", "not", "no"})
_WORD = re.compile(r"[a-z]+")


def is_yes(answer: str) -> bool:
    """What the published parser makes of an answer: `no` if its first sentence denies, everything else `yes`.

    The first sentence ends at the first full stop. Commas are removed. Words are split at blanks, and of them `No`,
    `not` and `no` deny, in exactly this spelling.

    Source: Li et al. 2023 (POPE), arXiv:2305.10355, as LLaVA's and LLaVA-KD's eval_pope.py read answers.
    """
    first = answer.partition(".")[0].replace(",", "")
    return _DENIALS.isdisjoint(first.split(" "))


def is_clear(answer: str) -> bool:
    """Whether the answer has a yes or a no among its words, whatever their case, and not both.

    `is_yes` calls every other answer yes, an empty one too; so unclear answers are counted.
    """
    words = set(_WORD.findall(answer.lower()))
    return ("yes" in words) != bool(words & {"no", "not"})


@dataclass(frozen=True, slots=True)
class YesNoScores:
    """Counts of right and wrong answers; `yes` is the positive class."""

    true_yes: int
    false_yes: int
    true_no: int
    false_no: int

    @classmethod
    def of(cls, said: Sequence[bool], right: Sequence[bool]) -> YesNoScores:
        """Counts over questions.

        Args:
            said: whether the model answered yes.
            right: whether yes is the answer.
        """
        pairs = list(zip(said, right, strict=True))
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True))))

    def to_dict(self) -> dict[str, Any]:
        """`accuracy`, `precision`, `recall`, `f1` and `yes_ratio` in percent, and the counts.

        Precision is None where no answer is yes, recall where no right answer is; F1 is then 0 or None by its formula.
        """
        both = self.true_yes + self.true_no
        total = both + self.false_yes + self.false_no
        return {
            "accuracy": _percent(both, total),
            "precision": _percent(self.true_yes, self.true_yes + self.false_yes),
            "recall": _percent(self.true_yes, self.true_yes + self.false_no),
            "f1": _percent(2 * self.true_yes, 2 * self.true_yes + self.false_yes + self.false_no),
            "yes_ratio": _percent(self.true_yes + self.false_yes, total),
            "num_questions": total,
            "num_yes": self.true_yes + self.false_no,
        }


def _percent(count: int, of: int) -> float | None:
    return 100 * count / of if of else None

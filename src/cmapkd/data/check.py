"""The ledger of a run's samples: how many were good, which were bad and why, and whether that is too many."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cmapkd.config import RESUME, RunStopped, counted
from cmapkd.config.disk import usual_rights

NO_CAPTION = "no caption"
FILE_NAME = "bad_samples.jsonl"
MOST_LISTED = 1000  # bad samples that are listed by id; the others are counted
MOST_KINDS = 100  # kinds of reasons that are told apart
OTHER_KINDS = "other reasons"
_MOST_CHARACTERS = 500  # of a listed id or reason


def percent(share: float, *, beside: float) -> str:
    """A share in percent, with so many decimals that it does not look like the limit `beside` it: `1.03 %`."""
    for digits in range(2, 8):
        text = f"{100 * share:.{digits}g}"
        if share == beside or float(text) != float(f"{100 * beside:.{digits}g}"):
            break
    return f"{float(text):.10g} %"  # no exponent, as 100 to two digits would have


class TooManyBadSamples(RunStopped):
    """More of the data was unreadable than the run allows.

    Attributes:
        settings: with which the resumed run goes on, as `key=value`.
    """

    def __init__(self, message: str, *, settings: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.settings = tuple(settings)


class SampleLedger:
    """Counts readings of samples, by kind of reason: the part of a reason before its first colon.

    A sample read again in a later epoch counts again, so that the share does not depend on the number of epochs. The
    list holds it once, and no more than the first `MOST_LISTED` of them: a ledger stays small whatever the data. A
    sample without caption says nothing and is not bad: it has a count of its own.
    """

    def __init__(self) -> None:
        self.num_good = 0
        self.num_bad = 0
        self.num_without_caption = 0
        self.kinds: Counter[str] = Counter()
        self._bad: dict[str, str] = {}

    @property
    def bad(self) -> tuple[tuple[str, str], ...]:
        """(id, reason) of the first `MOST_LISTED` bad samples, in the order they were met."""
        return tuple(self._bad.items())

    def add(self, num_good: int, bad: Iterable[tuple[str, str]] = ()) -> None:
        """Counts a batch: how many samples were good, and (id, reason) of those that were not."""
        self.num_good += num_good
        for sample_id, reason in bad:
            if reason.startswith(NO_CAPTION):
                self.num_without_caption += 1
                continue
            self.num_bad += 1
            self._count_kind(reason.partition(":")[0])
            self._list(sample_id, reason)

    def _count_kind(self, kind: str, count: int = 1) -> None:
        kind = kind[:_MOST_CHARACTERS]
        self.kinds[kind if kind in self.kinds or len(self.kinds) < MOST_KINDS else OTHER_KINDS] += count

    def _list(self, sample_id: str, reason: str) -> None:
        if len(self._bad) < MOST_LISTED:
            self._bad.setdefault(sample_id[:_MOST_CHARACTERS], reason[:_MOST_CHARACTERS])

    def share(self) -> float:
        """Bad readings over all, in [0, 1]."""
        return self.num_bad / max(1, self.num_good + self.num_bad)

    def check_share(self, max_share: float, minimum: int = 100, *, ended: bool = False) -> None:
        """Stops a run whose data is broken, once `minimum` samples were read.

        Args:
            ended: whether the last step is trained and saved, so that only the scores are missing.
        Raises:
            TooManyBadSamples: the share of bad readings is above `max_share`.
        """
        total, share = self.num_good + self.num_bad, self.share()
        if total < minimum or share <= max_share:
            return
        sample_id, reason = self.bad[0]
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common(4))
        saved = "All steps are trained and saved. To get the scores, repair" if ended else "Repair"
        raise TooManyBadSamples(
            f"{self.num_bad} of {counted(total, 'reading')} of samples ({percent(share, beside=max_share)}) failed, "
            f"more than max_bad_share {100 * max_share:.4g} %: first: {sample_id}: {reason}. By kind: {kinds}. "
            f"{saved} the data or raise data.max_bad_share, and {RESUME}.",
            settings=[f"data.max_bad_share={math.ceil(100 * share + 1e-9) / 100:g}"],
        )

    def summary(self) -> str:
        """One line for the log."""
        line = f"{counted(self.num_good, 'sample')} read, {self.num_bad} bad"
        if self.kinds:
            line += " (" + ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common()) + ")"
        return line + (f", {self.num_without_caption} without caption" if self.num_without_caption else "")

    def write(self, folder: Path) -> Path:
        """Writes `bad` to `bad_samples.jsonl`, one `{"id": ..., "reason": ...}` a line, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                for sample_id, reason in self._bad.items():
                    file.write(json.dumps({"id": sample_id, "reason": reason}) + "\n")
            usual_rights([Path(name)])
            return Path(name).replace(folder / FILE_NAME)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint; `load_state_dict` of it continues as if nothing had happened."""
        return {
            "num_good": self.num_good,
            "num_bad": self.num_bad,
            "num_without_caption": self.num_without_caption,
            "kinds": dict(self.kinds),
            "bad": [list(pair) for pair in self._bad.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        try:
            self.num_good, self.num_bad = int(state["num_good"]), int(state["num_bad"])
            self.num_without_caption = int(state["num_without_caption"])
            self.kinds = Counter({str(kind): int(count) for kind, count in state["kinds"].items()})
            self._bad = {str(sample_id): str(reason) for sample_id, reason in state["bad"][:MOST_LISTED]}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"the counts of samples in a checkpoint are malformed ({type(error).__name__}: {error})"
            ) from None

    def merge(self, state: dict[str, Any]) -> None:
        """Adds another process's ledger, given as its `state_dict`."""
        self.num_good += int(state["num_good"])
        self.num_bad += int(state["num_bad"])
        self.num_without_caption += int(state["num_without_caption"])
        for kind, count in state["kinds"].items():
            self._count_kind(str(kind), int(count))
        for sample_id, reason in state["bad"]:
            self._list(str(sample_id), str(reason))

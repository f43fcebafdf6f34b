"""Targets that a method builds once, before its first step, from a teacher's answers to the training data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.models.types import BOTH, Tower


@dataclass(frozen=True, slots=True)
class Answered:
    """A teacher's answers to some samples of the training data, on the CPU; the same on every process.

    Attributes:
        image, text: embeddings as the teacher gives them, not normalised; of width 0 where the tower was not asked.
        keys: name the samples as `features.sample_keys` does: in a step, `sample_keys(batch.ids)` finds them again.
        labels: as the method's batches bring them, -1 where there is none, and where the method reads no labels.
    """

    image: Float[Tensor, "part dim"]
    text: Float[Tensor, "part dim"]
    keys: Int[Tensor, " part"]
    labels: Int[Tensor, " part"]

    @classmethod
    def joined(cls, parts: Iterator[Answered]) -> Answered:
        """All parts as one, for targets that need every sample at once.

        Raises:
            ValueError: there is no part.
        """
        every = [*parts]
        if not every:
            raise ValueError("the teacher answers no sample of the training data, so nothing can be built from answers")
        columns = zip(*((each.image, each.text, each.keys, each.labels) for each in every), strict=True)
        return cls(*(torch.cat(column) for column in columns))


class Survey(Protocol):
    """A pass over the training data in which a teacher answers each sample once; see `MethodContract.prepare`.

    A sample is shown in the view, and with the text, in which the run reads it first. Samples that the run never reads
    are left out. So a cache has all answers, and a live teacher gives the same ones.
    """

    def __call__(
        self, role: str = "teacher", *, num: int | None = None, towers: tuple[Tower, ...] = BOTH
    ) -> Iterator[Answered]:
        """Answers in parts of a batch, in the order of the training data. Every process must read all parts.

        Args:
            role: of the teacher.
            num: of so many samples, each equally likely and the same in every run; None: of all.
            towers: that answer; another one's embeddings have width 0.
        """
        ...

"""Pictures without captions: a stream from which the student's image tower alone learns the teacher's space.

The term is CLIP-KD's feature distance (arXiv:2307.12732) of pictures alone, beside whatever a method makes of pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.chosen import chosen_rows
from cmapkd.data.types import Batch
from cmapkd.features import PairProjector
from cmapkd.methods.base import Method
from cmapkd.methods.card import MethodConfig
from cmapkd.methods.micro_batches import encode_checkpointed, micro_batches
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, FrozenTeacher, Model
from cmapkd.models.reach import example_output, last_matrix_behind
from cmapkd.objectives import embedding_distance

UNPAIRED = "unpaired"
"""The name of the term."""


@dataclass(frozen=True, slots=True)
class UnpairedPictures:
    """The streams of the data whose pictures have no captions, and the weight of their term."""

    streams: tuple[str, ...]
    weight: float


class UnpairedMethod(Method):
    """A method that can learn from pictures without captions beside what it makes of pairs."""

    def __init__(self, config: MethodConfig, **models: Any) -> None:
        super().__init__(config, **models)
        self.unpaired: Unpaired | None = None  # where the data have any

    @abstractmethod
    def pictures_of(self, part: Batch) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch teacher_dim"]]:
        """The student's and its teacher's embeddings of a part's pictures, of this process; texts are not read."""

    def terms_in_run(self, batch: Batch) -> dict[str, Term]:
        if self.unpaired is None:
            return super().terms_in_run(batch)
        pairs, alone = self.unpaired.split(batch)
        terms = super().terms_in_run(pairs)
        if self.stage.wants_term(UNPAIRED):
            terms[UNPAIRED] = self.unpaired(self, alone)
        return terms

    def check_learning(self) -> None:
        super().check_learning()
        if self.unpaired is not None:
            self.unpaired.check_learning(self.student)

    @property
    def all_term_names(self) -> tuple[str, ...]:
        return super().all_term_names + (() if self.unpaired is None else (UNPAIRED,))

    @property
    def streams(self) -> tuple[str, ...]:
        return () if self.unpaired is None else self.unpaired.given.streams

    @property
    def equal_streams(self) -> bool:
        return self.unpaired is not None


class Unpaired(nn.Module):
    """The term of pictures without captions, for any method over pairs.

    The student's embeddings are mapped to the teacher's width as the method maps those of its pictures, where it does.

    Raises:
        ConfigError: the method learns from no frozen teacher.
    """

    def __init__(self, given: UnpairedPictures, method: UnpairedMethod) -> None:
        super().__init__()
        teacher, student = method.teachers.get("teacher"), method.student
        if not isinstance(teacher, FrozenTeacher):
            raise ConfigError(
                f"pictures of data.more.{given.streams[0]} have no captions, and this method has no teacher to learn "
                "from them: leave the stream out"
            )
        assert isinstance(student, DualEncoder)
        self.given = given
        shared = isinstance(getattr(method, "project", None), PairProjector)
        self.own = None if shared else PairProjector(student.embed_dim, teacher.embed_dim)

    def check_learning(self, student: Model) -> None:
        """Refuses a student of whose pictures' embeddings nothing learns.

        Raises:
            ConfigError: names what can be changed.
        """
        assert isinstance(student, DualEncoder)
        try:
            last_matrix_behind(student, partial(example_output, student, "image"), learning=True)
        except ValueError:
            raise ConfigError(
                f"pictures of data.more.{self.given.streams[0]} have no captions, so they teach what stands behind the "
                f"embeddings of pictures, and nothing of that learns in {student.name}: let image or projections "
                "learn (training.train_parts), or leave the stream out"
            ) from None

    def split(self, batch: Batch) -> tuple[Batch, Batch]:
        """The pairs of a batch, and its pictures without captions.

        Raises:
            ConfigError: there are none of either.
        """
        alone = [place for place, name in enumerate(batch.streams) if name in self.given.streams]
        others = sorted({*range(len(batch))} - {*alone})
        if not alone or not others:
            raise ConfigError(
                f"pictures of data.more.{self.given.streams[0]}, which have no captions, are learned from beside "
                f"pairs, and this batch has {len(alone)} such pictures and {len(others)} pairs"
            )
        return replace(chosen_rows(batch, others), held_out=batch.held_out), chosen_rows(batch, alone)

    def forward(self, method: UnpairedMethod, batch: Batch) -> Term:
        """The distances of this process's pictures, summed and counted.

        Args:
            batch: the pictures; their texts are not read.
        """
        project = getattr(method, "project", None) if self.own is None else self.own
        assert isinstance(project, PairProjector)

        def distances(part: Batch, _number: int) -> Tensor:
            own, of_teacher = method.pictures_of(part)
            return embedding_distance(project.of_images(own), of_teacher).sum()

        sums = encode_checkpointed(distances, micro_batches(batch, method.micro_batch), model=method)
        return Term(torch.stack(sums).sum(), self.given.weight, torch.tensor(len(batch)))

"""Teachers: models that only answer. Frozen ones stand outside every checkpoint; a momentum one follows the student."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NoReturn, Protocol, Self

import torch
from torch import Tensor, nn

from cmapkd.config import closest
from cmapkd.data.types import Batch
from cmapkd.models.average import follow
from cmapkd.models.base import DualEncoder, Model
from cmapkd.models.contracts import dual
from cmapkd.models.held_weights import hold_in_bf16
from cmapkd.models.types import Features, LevelRequest


class Teacher(Protocol):
    """What a method asks of a teacher: `FrozenTeacher`, `cache.CachedTeacher` or `MomentumTeacher`.

    Attributes:
        role: the teacher's name in a run: `teacher`, or one of its own.
        reads: the role whose input in a batch the teacher is given; its own, or the student's.
        model: what the teacher is: levels, preprocessing, tokenizer. A cached one has no weights.
        from_disk: whether asking costs a look into a file, and not a pass of a model.
    """

    role: str
    model: Any
    from_disk: ClassVar[bool]

    @property
    def reads(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def embed_dim(self) -> int: ...

    def to(self, device: torch.device | str) -> Any: ...

    def __call__(self, batch: Batch, needs: Any = None) -> Any:
        """`Features` of the teacher's own form of the batch, detached; `TokenFeatures` of one that writes."""
        ...

    def reference_embeddings(self, num: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Embeddings of `num` samples that a method compares others with, see `FrozenTeacher`."""
        ...


class FrozenTeacher:
    """Wraps a model, of either contract, so that nothing can train it.

    Deliberately not an `nn.Module`: assigned to a method it is no submodule, so it appears in no `parameters()`, no
    `state_dict()` and no distributed wrapper, and a `train()` on the method does not reach it.

    Attributes:
        shared: whether somebody else reads the model's weights too, as a student does whose text tower it has.
    """

    from_disk: ClassVar[bool] = False  # whether asking costs a look into a file, and not a pass of a model

    model: Any  # a `DualEncoder`, or a `GenerativeModel`: whoever reads it knows which one the method needs

    def __init__(self, model: Model, role: str = "teacher", *, shared: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.role, self.shared = role, shared

    @property
    def reads(self) -> str:
        return self.role

    @property
    def name(self) -> str:
        return str(self.model.name)

    @property
    def embed_dim(self) -> int:
        """Width of the joint space of a model that embeds.

        Raises:
            ConfigError: this one writes.
        """
        return dual(self.model, "a method that compares embeddings").embed_dim

    def to(self, device: torch.device | str) -> FrozenTeacher:
        self.model.to(device)
        return self

    def hold_in_bf16(self) -> None:
        """Holds in bf16 the weights that autocast would cast at every use: the same answers under it, less memory.

        Nothing is done to weights that somebody else reads, and to models that write, whose `dtype` a recipe states.
        """
        if isinstance(self.model, DualEncoder) and not (self.shared or self.from_disk or self.model.held):
            hold_in_bf16(self.model)

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: Any = None) -> Any:
        """`Features` of the teacher's own form of the batch, detached; `TokenFeatures` of one that writes."""
        return self.model(batch.inputs[self.role], needs)

    def reference_embeddings(self, num: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Embeddings of `num` samples that a method compares others with; only a cache has them.

        Returns:
            In parts of some thousand: float32 [part dim] of images and of texts, and Int[part], where their samples
            stand in the training source.
        Raises:
            ValueError: this teacher answers live.
        """
        raise ValueError(f"{num} reference embeddings are to be drawn from the teacher's cache: set cache: auto")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a FrozenTeacher is never saved: keep its name in the config and load it again")

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self  # frozen, so a copy of the method may share it


class MomentumTeacher(nn.Module):
    """A teacher whose weights are a moving average of the student's (mean teacher, arXiv:1703.01780; MoCo, 1911.05722).

    A method makes it in its `__init__` and keeps it as a submodule and among its teachers:
    `self.momentum = MomentumTeacher(student)`, `self.teachers[self.momentum.role] = self.momentum`. It reads the
    student's inputs, stays in eval mode, and moves after every optimizer step. Its weights are in the method's
    checkpoints, once, and never in the saved student. No optimizer sees them.

    Args:
        student: copied; every parameter of the copy is frozen.
        decay: weight of the past in the first step, in [0, 1]; 1: it never moves, but for what is no weight.
        parts: names in the student's `parts` that are averaged (`projections`, ...); the rest is the student as it is.
            None: everything is averaged.
        schedule: constant; or cosine, where the decay rises to 1 at the end of the run (BYOL, arXiv:2006.07733).
    """

    from_disk: ClassVar[bool] = False
    reads = "student"

    def __init__(
        self,
        student: DualEncoder,
        *,
        decay: float = 0.999,
        schedule: Literal["constant", "cosine"] = "constant",
        parts: Sequence[str] | None = None,
        role: str = "momentum",
    ) -> None:
        super().__init__()
        known = student.parts
        for part in parts or ():
            if part not in known:
                raise ValueError(
                    f"{student.name} has no part {part!r}{closest(part, known)}; it has: {', '.join(known)}"
                )
        if not 0 <= decay <= 1:
            raise ValueError(f"the decay of a momentum teacher is {decay:g}: give a number from 0 to 1")
        self.model = copy.deepcopy(student).eval().requires_grad_(False)
        self.decay, self.schedule, self.role = decay, schedule, role
        self.averaged = None if parts is None else frozenset().union(*(known[part] for part in parts))

    @property
    def name(self) -> str:
        return f"momentum of {self.model.name}"

    @property
    def embed_dim(self) -> int:
        return self.model.embed_dim

    @torch.no_grad()
    def forward(self, batch: Batch, needs: LevelRequest | None = None) -> Features:
        """Features of the student's form of the batch, detached."""
        output: Features = self.model(batch.inputs[self.reads], needs)
        return output

    def update(self, student: nn.Module, step: int, total: int) -> None:
        """Moves towards the student.

        Args:
            step: optimizer steps done before the one that just ended.
            total: of the whole run.
        """
        follow(self.model, student, self.decay_at(step, total), averaged=self.averaged)

    def decay_at(self, step: int, total: int) -> float:
        """Weight of the past at a step, in [0, 1)."""
        if self.schedule == "constant":
            return self.decay
        return 1 - (1 - self.decay) * (1 + math.cos(math.pi * step / total)) / 2

    def reference_embeddings(self, num: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        raise ValueError(f"{num} reference embeddings are asked of a momentum teacher, which changes with every step")

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  a momentum teacher answers in eval mode only
        return super().train(False)

"""`FrozenTeacher`: a model that only answers. Eval mode, no gradient, and outside every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from cmapkd.data.types import Batch
from cmapkd.models.base import DualEncoder
from cmapkd.models.types import Features, Needs


class FrozenTeacher:
    """Wraps a `DualEncoder` so that nothing can train it.

    Deliberately not an `nn.Module`: assigned to a method it is no submodule, so it appears in no `parameters()`, no
    `state_dict()` and no distributed wrapper, and a `train()` on the method does not reach it.
    """

    from_disk: ClassVar[bool] = False  # whether asking costs a look into a file, and not a pass of a model

    def __init__(self, model: DualEncoder, role: str = "teacher") -> None:
        self.model = model.eval().requires_grad_(False)
        self.role = role  # by which batches name what is made for this teacher

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def embed_dim(self) -> int:
        return self.model.embed_dim

    def to(self, device: torch.device | str) -> FrozenTeacher:
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: Needs | None = None) -> Features:
        """Features of the teacher's own form of the batch, detached."""
        output: Features = self.model(batch.inputs[self.role], needs)
        return output

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

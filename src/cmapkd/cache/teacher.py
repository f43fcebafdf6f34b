"""`CachedTeacher`: the frozen teacher's interface, answered from disk. Its weights are not in memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cmapkd.cache.config import Check
from cmapkd.cache.folder import CacheFolder
from cmapkd.cache.layout import RowLayout
from cmapkd.cache.reader import CacheReader
from cmapkd.cache.wanted import Wanted
from cmapkd.data.types import Batch, ModelInput, StoredRows
from cmapkd.models import Features, FrozenTeacher, LevelRequest, Model

REFERENCE_SEED = 0  # the same reference set in every process, and after a resume


def _description(model: Any) -> Any:
    """A copy without weights. Whoever else holds the model keeps them: a student whose texts it embeds."""
    empty: dict[int, Tensor] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    empty |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, empty)


class CacheWarning(UserWarning):
    """The live teacher had to answer."""


class CachedTeacher(FrozenTeacher):
    """Answers with what `batch.stored` has for its role; for samples without an answer it loads the teacher after all.

    `model` says what the teacher is (levels, preprocessing, tokenizer); its weights are on the meta device.

    Args:
        reload: loads the teacher again, in eval mode, on the CPU.
        wanted: what the run reads: reference embeddings are drawn from it.
        check: when checksums are compared where reference embeddings are drawn, see `CacheConfig`.
    """

    from_disk = True

    def __init__(
        self,
        model: Model,
        cache: CacheFolder,
        *,
        reload: Callable[[], Any],
        wanted: Wanted,
        precision: str = "fp32",
        check: Check = "first_use",
        role: str = "teacher",
    ) -> None:
        super().__init__(_description(model), role)
        self.cache, self.reload, self.precision, self.check = cache, reload, precision, check
        self.wanted = wanted
        self.live: FrozenTeacher | None = None
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> CachedTeacher:
        self.device = torch.device(device)
        if self.live is not None:
            self.live.to(device)
        return self

    def reference_embeddings(self, num: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See `CacheReader.embeddings`: Float[part dim] of images and of texts, Int[part] of their samples."""
        return CacheReader(self.cache, check=self.check).embeddings(num, self.wanted, seed=REFERENCE_SEED)

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: LevelRequest | None = None) -> Features:
        needs = needs or LevelRequest()
        stored = batch.stored[self.role]
        inputs = batch.pairs(self.role) if self.role in batch.inputs else None
        layout = self.cache.layout
        assert isinstance(layout, RowLayout)
        arrays = layout.decode(stored.arrays)
        if len(stored.missing):
            assert inputs is not None
            self._answer(layout, arrays, stored, inputs)
        device = arrays["image"].device
        scale, bias = self.cache.logit_scale, self.cache.logit_bias
        assert scale is not None
        return layout.features(
            arrays,
            needs,
            None if inputs is None else inputs.texts,
            logit_scale=torch.tensor(scale, device=device),
            logit_bias=None if bias is None else torch.tensor(bias, device=device),
        )

    def loaded(self, missing: int, device: torch.device) -> FrozenTeacher:
        """The live teacher, for samples without an answer; warns when it is loaded.

        Args:
            missing: such samples in the first batch that has any.
        """
        if self.live is None:
            answers = "the student answers live" if self.role == "student" else "the teacher is loaded to answer"
            warnings.warn(
                f"the cache {self.cache.path} lacks {missing} samples of a batch (not foreseen, or not readable when "
                f"it was built): {answers} for such samples",
                CacheWarning,
                stacklevel=5,
            )
            self.live = FrozenTeacher(self.reload(), shared=self.role == "student").to(device)
            if self.precision == "bf16":
                self.live.hold_in_bf16()
        return self.live

    def _answer(self, layout: RowLayout, arrays: dict[str, Tensor], stored: StoredRows, inputs: ModelInput) -> None:
        """Fills in the rows of `arrays` ([batch ...] each) that have no answer, from the live teacher."""
        live = self.loaded(len(stored.missing), inputs.images.device)
        places = stored.missing.to(inputs.images.device)
        texts = inputs.texts.rows(places)
        more = {pool: tokens.rows(places) for pool, tokens in inputs.more_texts.items()}
        for name, values in layout.ask(live, ModelInput(inputs.images, texts, more), self.precision).items():
            arrays[name][places] = values.to(arrays[name].dtype)

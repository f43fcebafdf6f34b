"""`CachedTeacher`: the frozen teacher's interface, answered from disk. Its weights are not in memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cmapkd.cache.config import Check
from cmapkd.cache.parts import CacheFolder
from cmapkd.cache.reader import CacheReader
from cmapkd.cache.writer import live_features
from cmapkd.data.types import Batch, ModelInput, StoredRows
from cmapkd.models import DualEncoder, Features, FrozenTeacher, LevelRequest
from cmapkd.models.types import BOTH

REFERENCE_SEED = 0  # the same reference set in every process, and after a resume


def _description(model: DualEncoder) -> DualEncoder:
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
        check: when checksums are compared where reference embeddings are drawn, see `CacheConfig`.
    """

    from_disk = True

    def __init__(
        self,
        model: DualEncoder,
        cache: CacheFolder,
        *,
        reload: Callable[[], DualEncoder],
        precision: str = "fp32",
        check: Check = "first_use",
        role: str = "teacher",
    ) -> None:
        super().__init__(_description(model), role)
        self.cache, self.reload, self.precision, self.check = cache, reload, precision, check
        self.live: FrozenTeacher | None = None
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> CachedTeacher:
        self.device = torch.device(device)
        if self.live is not None:
            self.live.to(device)
        return self

    def reference_embeddings(self, num: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See `CacheReader.embeddings`: Float[part dim] of images and of texts, Int[part] of their samples."""
        return CacheReader(self.cache, check=self.check).embeddings(num, seed=REFERENCE_SEED)

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: LevelRequest | None = None) -> Features:
        needs = needs or LevelRequest()
        stored = batch.stored[self.role]
        inputs = batch.pairs(self.role) if self.role in batch.inputs else None
        layout = self.cache.layout
        arrays = layout.decode(stored.arrays)
        if len(stored.missing):
            assert inputs is not None
            self._answer(arrays, stored, inputs)
        device = arrays["image"].device
        bias = self.cache.logit_bias
        return layout.features(
            arrays,
            needs,
            None if inputs is None else inputs.texts,
            logit_scale=torch.tensor(self.cache.logit_scale, device=device),
            logit_bias=None if bias is None else torch.tensor(bias, device=device),
        )

    def _answer(self, arrays: dict[str, Tensor], stored: StoredRows, inputs: ModelInput) -> None:
        """Fills in the rows of `arrays` ([batch ...] each) that have no answer, from the live teacher."""
        if self.live is None:
            answers = "the student answers live" if self.role == "student" else "the teacher is loaded to answer"
            warnings.warn(
                f"the cache {self.cache.path} lacks {len(stored.missing)} samples of a batch (not foreseen, or not "
                f"readable when it was built): {answers} for such samples",
                CacheWarning,
                stacklevel=4,
            )
            self.live = FrozenTeacher(self.reload()).to(inputs.images.device)
        places = stored.missing.to(inputs.images.device)
        texts = inputs.texts.rows(places)
        more = {pool: tokens.rows(places) for pool, tokens in inputs.more_texts.items()}
        lacking = ModelInput(inputs.images, texts, more)
        layout = self.cache.layout
        levels = [field for field in layout.fields if field.level is not None]
        of_image, of_text = (
            tuple(dict.fromkeys(str(field.level) for field in levels if field.tower == tower)) for tower in BOTH
        )
        needs = LevelRequest(of_image, of_text)
        features = live_features(self.live, lacking, needs, self.precision)
        for name, values in layout.arrays(features, texts).items():
            arrays[name][places] = values.to(arrays[name].dtype)

"""`CachedTokens`: a frozen teacher that writes, answered from disk by its likeliest tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cmapkd.cache.teacher import CachedTeacher
from cmapkd.cache.token_layout import Answers, TokenLayout
from cmapkd.data.dialogues import ChatInput
from cmapkd.data.types import Batch, StoredRows
from cmapkd.models.token_types import TokenFeatures, TokenNeeds


class CachedTokens(CachedTeacher):
    """Answers with `TokenFeatures.top` and `targets`, in the order of a live teacher's rows; it has no states.

    A sample without an answer is read and answered by the live teacher, whose rows take their places among the others.
    """

    @torch.no_grad()
    def __call__(self, batch: Batch, needs: TokenNeeds | None = None) -> TokenFeatures:  # type: ignore[override]
        """Of a part of a batch.

        Raises:
            ValueError: something else than next-token distributions is asked for.
        """
        if needs not in (None, TokenNeeds()):
            raise ValueError(f"a cache holds next-token distributions alone, and {needs} is asked for: set cache: off")
        layout, stored = self.cache.layout, batch.stored[self.role]
        assert isinstance(layout, TokenLayout)
        found = layout.flat(layout.decode(stored.arrays))
        if len(stored.missing):
            inputs = batch.inputs[self.role]
            assert isinstance(inputs, ChatInput)
            found = found.joined(self._answered(layout, stored, inputs))
        return TokenFeatures({}, found.targets, top=layout.top(found))

    def reference_embeddings(self, num: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        raise ValueError(f"{num} reference embeddings are asked of a teacher that writes, which has none")

    def _answered(self, layout: TokenLayout, stored: StoredRows, inputs: ChatInput) -> Answers:
        """The live teacher's answers to the samples that lack one, in their places in the batch."""
        places = stored.missing.to(inputs.texts.ids.device)
        live = self.loaded(len(places), places.device)
        found, _ = layout.answers(live, inputs.rows(places.tolist()), self.precision)
        return found._replace(sample=places[found.sample])

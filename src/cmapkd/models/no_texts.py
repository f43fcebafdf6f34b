"""The tokenizer of models that read no texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cmapkd.data.types import TokenBatch


class NoTexts:
    """The tokenizer of a model that reads none: one token for any text."""

    context_length = 1
    vocab_size = 1
    whole_because = "it reads no texts"

    def __call__(self, texts: str | Sequence[str], *, spans: bool = False) -> TokenBatch:
        number = 1 if isinstance(texts, str) else len(texts)
        where = torch.zeros(number, 1, 2, dtype=torch.long) if spans else None
        return TokenBatch(torch.zeros(number, 1, dtype=torch.long), torch.ones(number, 1, dtype=torch.bool), where)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoTexts)

    def __hash__(self) -> int:
        return hash(NoTexts)

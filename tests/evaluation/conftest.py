"""A small model, and a source that lives in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from cmapkd.data.types import BadSampleError, Sample
from cmapkd.models.tiny import TinyDualEncoder, TinyOptions
from cmapkd.models.vocabulary import TrainedTokenizer

WORDS = ("red", "green", "blue", "small", "large", "cat", "dog", "boat", "near", "under", "tree", "house")


class MemorySource:
    """Noise pictures of differing sizes with drawn captions; `captions` and `labels` can be set by hand."""

    def __init__(
        self,
        length: int = 12,
        *,
        captions: Sequence[tuple[str, ...]] | None = None,
        labels: Sequence[int | None] | None = None,
        class_names: Sequence[str] | None = None,
        broken: Sequence[int] = (),
    ) -> None:
        self.name = "memory"
        draws = np.random.default_rng(0)
        sizes = [(int(a), int(b)) for a, b in draws.integers(20, 60, (length, 2))]
        self.images = [Image.fromarray(draws.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        drawn = [
            tuple(" ".join(draws.choice(WORDS, int(draws.integers(1, 9)))) for _ in range(1 + number % 3))
            for number in range(length)
        ]
        self.captions = drawn if captions is None else list(captions)
        self.labels = [None] * length if labels is None else list(labels)
        self.broken = set(broken)
        self._class_names = class_names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise BadSampleError(f"m{index}", "truncated file")
        return Sample(f"m{index}", self.images[index], self.captions[index], self.labels[index])

    @property
    def class_names(self) -> Sequence[str] | None:
        return self._class_names

    def fingerprint(self) -> str:
        return "memory"


@pytest.fixture
def make_source() -> Callable[..., MemorySource]:
    return MemorySource


@pytest.fixture
def model() -> TinyDualEncoder:
    options = TinyOptions(
        image_size=16, patch_size=8, vision_width=32, vision_depth=1, text_width=32, text_depth=1, embed_dim=16
    )
    tokenizer = TrainedTokenizer.train([" ".join(WORDS)] * 4, vocab_size=100, context_length=16)
    torch.manual_seed(0)
    return TinyDualEncoder(options, tokenizer)

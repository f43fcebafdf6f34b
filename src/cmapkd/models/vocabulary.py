"""A subword tokenizer learned from the training captions, for models that start without one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from cmapkd.data.types import TokenBatch
from cmapkd.models.types import text_list

FILE = "tokenizer.json"
_SPECIAL = ["[PAD]", "[UNK]", "[START]", "[END]"]


class TrainedTokenizer:
    """Byte-pair encoding over lower-cased words (the `tokenizers` library), framed by start and end tokens."""

    def __init__(self, tokenizer: RustTokenizer, *, context_length: int) -> None:
        self.context_length = context_length
        self._tokenizer = tokenizer
        self._tokenizer.enable_truncation(context_length)
        self._tokenizer.enable_padding(pad_id=0, pad_token=_SPECIAL[0])
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.end_id: int | None = tokenizer.token_to_id(_SPECIAL[3])

    @classmethod
    def train(cls, captions: Iterable[str], *, vocab_size: int, context_length: int) -> TrainedTokenizer:
        """Learns at most `vocab_size` pieces; the same captions in the same order give the same vocabulary.

        Raises:
            ValueError: there are no captions to learn from.
        """
        tokenizer = RustTokenizer(models.BPE(unk_token=_SPECIAL[1]))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=_SPECIAL, min_frequency=2, show_progress=False
        )
        tokenizer.train_from_iterator(captions, trainer)
        if tokenizer.get_vocab_size() <= len(_SPECIAL):
            raise ValueError("no captions to learn a vocabulary from: give the model data with text, or a tokenizer")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[START] $A [END]",
            special_tokens=[(piece, _SPECIAL.index(piece)) for piece in ("[START]", "[END]")],
        )
        return cls(tokenizer, context_length=context_length)

    @classmethod
    def load(cls, folder: Path, *, context_length: int) -> TrainedTokenizer:
        """Reads `tokenizer.json` of a model folder.

        Raises:
            ValueError: it is missing or not a tokenizer.
        """
        try:
            text = (folder / FILE).read_text(encoding="utf-8")
            return cls(RustTokenizer.from_str(text), context_length=context_length)
        except Exception as error:  # the library raises bare Exception for malformed files
            raise ValueError(f"{folder / FILE} is not a readable tokenizer: {error}") from None

    def of_length(self, context_length: int) -> TrainedTokenizer:
        """The same, which cuts texts to another length."""
        return TrainedTokenizer(RustTokenizer.from_str(self._tokenizer.to_str()), context_length=context_length)

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(self._tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")

    def __call__(self, texts: str | Sequence[str], *, spans: bool = False) -> TokenBatch:
        encodings = self._tokenizer.encode_batch(text_list(texts))
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.long)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)
        if not spans:
            return TokenBatch(ids, mask).measured()
        places = np.array([encoding.offsets for encoding in encodings], dtype=np.int64)
        return TokenBatch(ids, mask, torch.from_numpy(places.reshape(*ids.shape, 2))).measured()

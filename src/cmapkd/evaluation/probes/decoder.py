"""The probe that writes captions: a small transformer decoder whose prefix is the image's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from cmapkd.evaluation.probes.probe import Head, HeadInput, ImageTokens
from cmapkd.models.tiny import Block

PAD, UNKNOWN, START, END = range(4)
_SPECIAL = ["[PAD]", "[UNK]", "[START]", "[END]"]


class WordTokenizer:
    """Lower-cased words without punctuation (caption metrics drop it too): the training captions' most frequent."""

    def __init__(self, captions: Iterable[str], *, most: int, length: int) -> None:
        """Learns the words.

        Raises:
            ValueError: there are none.
        """
        self.length = length
        tokenizer = Tokenizer(models.WordLevel(unk_token=_SPECIAL[UNKNOWN]))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\w'-]+"), "removed")
        tokenizer.train_from_iterator(
            captions, trainers.WordLevelTrainer(vocab_size=most, special_tokens=_SPECIAL, show_progress=False)
        )
        self._tokenizer = tokenizer
        if len(self) <= len(_SPECIAL):
            raise ValueError("the training captions have no words to learn from")

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @property
    def vocabulary(self) -> list[str]:
        """The words by number, special ones first."""
        return [str(self._tokenizer.id_to_token(number)) for number in range(len(self))]

    def __call__(self, captions: Sequence[str]) -> Int[Tensor, "captions length"]:
        """Start, words, end, padding; cut to `length` words."""
        rows = [encoding.ids[: self.length] for encoding in self._tokenizer.encode_batch(list(captions))]
        ids = torch.full((len(rows), self.length + 2), PAD)
        for number, row in enumerate(rows):
            ids[number, : len(row) + 2] = torch.tensor([START, *row, END])
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The words before the first end, joined by blanks."""
        words = []
        for number in ids:
            if number == END:
                break
            if number > END:
                words.append(str(self._tokenizer.id_to_token(number)))
        return " ".join(words)


class DecoderHead(Head):
    """Words attend to the image tokens and to the words before them; the output shares the word embeddings."""

    def __init__(
        self, *, patch_width: int, embed_dim: int, cells: int, words: int, length: int, width: int, depth: int
    ) -> None:
        super().__init__()
        self.image = ImageTokens(patch_width, embed_dim, cells, width)
        self.words = nn.Embedding(words, width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.positions = nn.Parameter(torch.randn(1, length + 2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: HeadInput, ids: Int[Tensor, "batch words"]) -> Float[Tensor, "batch words vocabulary"]:
        """Logits of the word after each of `ids`."""
        prefix = self.image(inputs)
        x = torch.cat([prefix, self.words(ids) + self.positions[:, : ids.shape[1]]], dim=1)
        mask = _prefix_mask(prefix.shape[1], ids.shape[1], x.device)
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = self.norm(x[:, prefix.shape[1] :]) @ self.words.weight.T
        return logits

    def loss(self, inputs: HeadInput, targets: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Mean cross-entropy of the words of the batch, the end included. Reads `words` (Int[batch length])."""
        ids = targets["words"]
        ids = ids[:, : int((ids != PAD).sum(1).max())]
        logits = self(inputs, ids[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)

    def size(self, targets: dict[str, Tensor]) -> Int[Tensor, ""]:
        return (targets["words"][:, 1:] != PAD).sum()

    @torch.no_grad()
    def write(self, inputs: HeadInput, *, length: int) -> list[list[int]]:
        """The most probable next word, again and again, to the end or `length` words (greedy). No unknown words."""
        ids = torch.full((len(inputs.patches), 1), START, device=inputs.patches.device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(length):
            logits = self(inputs, ids)[:, -1]
            logits[:, [PAD, UNKNOWN, START]] = -torch.inf
            following = logits.argmax(-1).masked_fill(ended, END)
            ids = torch.cat([ids, following[:, None]], dim=1)
            ended |= following == END
            if bool(ended.all()):
                break
        return [[int(number) for number in row] for row in ids[:, 1:].tolist()]


def _prefix_mask(prefix: int, words: int, device: torch.device) -> Bool[Tensor, "1 1 tokens tokens"]:
    """The prefix sees itself, a word sees the prefix and the words up to itself."""
    total = prefix + words
    mask = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    mask[:prefix, :prefix] = True
    return mask[None, None]

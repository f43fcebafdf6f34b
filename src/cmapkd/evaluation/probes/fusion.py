"""The probe that answers questions: one transformer over image and question tokens, a classifier over answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmapkd.data.types import QuestionAnswer
from cmapkd.evaluation.probes.probe import Head, HeadInput, ImageTokens
from cmapkd.models.tiny import Block


class FusionHead(Head):
    """An answer token reads image and question tokens through pre-norm blocks; its state is classified.

    One more token is the product, channel by channel, of the two unit embeddings: their cosine, which is what a dual
    encoder was trained for, is its sum.
    """

    def __init__(
        self, *, patch_width: int, embed_dim: int, cells: int, text_width: int, answers: int, width: int, depth: int
    ) -> None:
        super().__init__()
        self.image = ImageTokens(patch_width, embed_dim, cells, width)
        self.question = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.product = nn.Linear(embed_dim, width)
        self.answer = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.kind = nn.Parameter(torch.randn(1, 1, width) * 0.02)  # tells question tokens from image tokens
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, answers))

    def forward(self, inputs: HeadInput) -> Float[Tensor, "batch answers"]:
        assert inputs.tokens is not None
        assert inputs.mask is not None
        assert inputs.text_embedding is not None
        images, questions = self.image(inputs), self.question(inputs.tokens) + self.kind
        product = F.normalize(inputs.embedding, dim=-1) * F.normalize(inputs.text_embedding, dim=-1)
        product = self.product(product * product.shape[-1])[:, None]  # channels of about 1
        x = torch.cat([self.answer.expand(len(images), -1, -1), product, images, questions], dim=1)
        real = torch.cat([inputs.mask.new_ones(len(x), 2 + images.shape[1]), inputs.mask], dim=1)
        for block in self.blocks:
            x = block(x, real[:, None, None, :])
        logits: Tensor = self.classify(x[:, 0])
        return logits

    def loss(self, inputs: HeadInput, targets: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Cross-entropy with the answers' shares: of several accepted ones, as often as each was given.

        Reads `answers` (Int[batch most], class numbers) and `shares` (Float[batch most]) of the targets.
        """
        log_p = self(inputs).float().log_softmax(-1)
        loss: Tensor = -(log_p.gather(1, targets["answers"]) * targets["shares"]).sum(1).mean()
        return loss

    def size(self, targets: dict[str, Tensor]) -> Int[Tensor, ""]:
        return torch.tensor(len(targets["answers"]), device=targets["answers"].device)


def frequent_answers(
    questions: Iterable[QuestionAnswer], *, most: int, normalise: Callable[[str], str]
) -> tuple[str, ...]:
    """The most frequent answers, each question counting once; ties in alphabetical order.

    Raises:
        ValueError: there are fewer than two different answers.
    """
    counts: Counter[str] = Counter()
    for question in questions:
        given = Counter(normalise(answer) for answer in question.answers)
        for answer, times in given.items():
            counts[answer] += times / sum(given.values())  # type: ignore[assignment]
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    if len(ordered) < 2:
        raise ValueError(f"the training questions have {len(ordered)} different answers: there is nothing to choose")
    return tuple(ordered[:most])


def answer_shares(
    questions: Sequence[QuestionAnswer], answers: Sequence[str], *, normalise: Callable[[str], str]
) -> tuple[Int[Tensor, "questions most"], Float[Tensor, "questions most"]]:
    """For each question which of `answers` were given and in what shares; all zero where none of them was."""
    place = {answer: number for number, answer in enumerate(answers)}
    rows = [Counter(place[a] for a in map(normalise, question.answers) if a in place) for question in questions]
    most = max((len(row) for row in rows), default=0) or 1
    numbers, shares = torch.zeros(len(rows), most, dtype=torch.long), torch.zeros(len(rows), most)
    for number, row in enumerate(rows):
        for column, (answer, times) in enumerate(row.items()):
            numbers[number, column], shares[number, column] = answer, times / sum(row.values())
    return numbers, shares

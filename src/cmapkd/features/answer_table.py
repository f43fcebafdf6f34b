"""Answers to the same questions about every picture of the training data, found by the pictures' keys."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class AnswerTable(nn.Module):
    """Rows of answers. They are buffers, so checkpoints hold them."""

    keys: Int[Tensor, " samples"]
    answers: Float[Tensor, "samples questions"]

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.questions = questions
        self.resize(0)

    def resize(self, number: int, device: torch.device | str = "cpu") -> None:
        """Makes room for the answers about so many samples."""
        self.register_buffer("keys", torch.zeros(number, dtype=torch.long, device=device))
        self.register_buffer("answers", torch.zeros(number, self.questions, device=device))

    def fill(self, keys: Int[Tensor, " samples"], answers: Float[Tensor, "samples questions"]) -> None:
        """Takes all answers at once."""
        self.resize(len(keys), self.keys.device)
        order = keys.argsort()
        self.keys.copy_(keys[order])
        self.answers.copy_(answers[order])

    def of(
        self, keys: Int[Tensor, " batch"], unknown: Float[Tensor, "batch questions"], *, hard: bool = False
    ) -> Float[Tensor, "batch questions"]:
        """The answers about some samples.

        Args:
            unknown: stand for those about which nobody was asked. The student's own probabilities have no gradient
                in a cross-entropy with themselves.
            hard: 0 or 1 in place of probabilities that are known.
        Raises:
            ValueError: nothing was filled in.
        """
        if not len(self.keys):
            raise ValueError("there are no answers yet: `prepare` comes before the first step")
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        answers = self.answers[places]
        answers = (answers >= 0.5).to(unknown.dtype) if hard else answers.to(unknown.dtype)
        return torch.where((self.keys[places] == keys)[:, None], answers, unknown)

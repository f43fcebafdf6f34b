"""Words: the pieces of text at which the tokens of two models can be compared, whichever tokenizers they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmapkd.data.types import TokenBatch

Role = Literal["student", "teacher"]
_NOWHERE = torch.iinfo(torch.long).max // 2  # where tokens without characters are sorted to


@dataclass(frozen=True, slots=True)
class Words:
    """Which word of its text each token of either model belongs to.

    Attributes:
        student, teacher: the number of each token's word, -1 where the token belongs to none. In a text words are
            numbered in their order; a number that no token has is no word.
        count: how many numbers there are, in every text.
        are_tokens: whether the host knows that both models have the same tokens. A word is then a token in its place.
    """

    student: Int[Tensor, "batch student_tokens"]
    teacher: Int[Tensor, "batch teacher_tokens"]
    count: int
    are_tokens: bool = False

    def of(self, role: Role) -> Int[Tensor, "batch tokens"]:
        """The numbers of one model's tokens."""
        return self.student if role == "student" else self.teacher

    def pool(
        self, role: Role, values: Float[Tensor, "batch tokens width"]
    ) -> tuple[Float[Tensor, "batch words width"], Bool[Tensor, "batch words"]]:
        """One model's hidden states as words, zeros where there is none, and where there is one.

        A word is the mean of its tokens, in float32 or wider. Words that are tokens keep their type: nothing is summed.
        """
        if not self.are_tokens:
            return pool_words(values, self.of(role), self.count)
        real = self.of(role)[:, : self.count] >= 0
        return values[:, : self.count].masked_fill(~real[..., None], 0), real


class WordAligner:
    """`aligned_words` of one pair of models, step after step, without waiting for a GPU.

    A pair of tokenizers that do not say where their tokens stand can be compared token by token alone. A GPU is then
    asked once, at the first batch, whether the tokens are the same: tokenizers do not change. Nothing else depends on
    whether it was asked: a micro-batch that the backward pass encodes again must have as many words as before.
    """

    def __init__(self) -> None:
        self._agreed = False

    def __call__(self, student: TokenBatch, teacher: TokenBatch) -> Words:
        """The words of a batch.

        Raises:
            ValueError: as `aligned_words` does.
        """
        on_host = student.ids.device.type == "cpu"
        if not on_host and not self._agreed and (student.spans is None or teacher.spans is None):
            if not _are_same(student, teacher):
                raise _cannot_be_matched(student, teacher)
            self._agreed = True
        return aligned_words(student, teacher, look=on_host)


def aligned_words(student: TokenBatch, teacher: TokenBatch, *, look: bool = True) -> Words:
    """Numbers the pieces of text that both models' tokens can be pooled to.

    The same tokens in both: every real token is a piece of its own, start and end tokens included. Otherwise a word is
    a smallest run of characters that no token of either model crosses the ends of and that both have tokens in; start
    and end tokens belong to none.

    Args:
        look: whether the host may read from the device. Free on the CPU; on a GPU it waits for all that was launched.
            Without, there are as many numbers as the model with fewer tokens has, and the device compares the tokens.
            If a tokenizer gives no spans, tokens of equal shape are then taken to be the same, and so are those of
            which one model's alone are cut to the longest text.
    Returns:
        The words. With `look` there are no more numbers than the longest text has words.
    Raises:
        ValueError: the tokens differ and a tokenizer gave no character spans, or the batches differ in size.
    """
    if len(student.ids) != len(teacher.ids):
        raise ValueError(
            f"the student has {len(student.ids)} texts, the teacher {len(teacher.ids)}: row i of both must be the same"
        )
    length = min(student.ids.shape[1], teacher.ids.shape[1])
    if look and _are_same(student, teacher):
        numbers = _places(student)
        count = int(numbers.max()) + 1 if numbers.numel() else 0
        return Words(numbers, _places(teacher), count, are_tokens=True)
    if student.spans is None or teacher.spans is None:
        one_is_cut = (student.lengths is None) != (teacher.lengths is None)
        if not look and (student.ids.shape == teacher.ids.shape or one_is_cut):
            return Words(_places(student), _places(teacher), length, are_tokens=True)
        raise _cannot_be_matched(student, teacher)
    of_student, of_teacher, shared = _numbers(student.spans, teacher.spans)
    if look:
        return Words(of_student, of_teacher, int(shared.sum(1).max()))
    same = _differences(student, teacher) == 0
    of_student = torch.where(same, _places(student), of_student)
    of_teacher = torch.where(same, _places(teacher), of_teacher)
    return Words(of_student, of_teacher, length)


def pool_words(
    values: Float[Tensor, "batch tokens width"], word_of_token: Int[Tensor, "batch tokens"], num_words: int
) -> tuple[Float[Tensor, "batch words width"], Bool[Tensor, "batch words"]]:
    """Means over the tokens of each word.

    Args:
        values: hidden states of one model's tokens.
        word_of_token: numbers from `aligned_words`, -1 for tokens that are left out.
        num_words: words to return, the same for both models.
    Returns:
        Words, float32 or wider, zeros where there is none; and where there is one: the same for both models.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    numbers = torch.arange(num_words, device=values.device)
    belongs = numbers[:, None] == word_of_token[:, None, :]  # batch words tokens
    counts = belongs.sum(-1)
    real = values.masked_fill((word_of_token < 0)[..., None], 0).to(wide)
    with torch.autocast(values.device.type, enabled=False):
        sums = belongs.to(wide) @ real
    return sums / counts.clamp_min(1)[..., None], counts > 0


def _places(tokens: TokenBatch) -> Int[Tensor, "batch tokens"]:
    """Each real token as a word of its own, numbered by its place."""
    places = torch.arange(tokens.ids.shape[1], device=tokens.mask.device).expand_as(tokens.ids)
    return places.masked_fill(~tokens.mask, -1)


def _are_same(student: TokenBatch, teacher: TokenBatch) -> bool:
    """Whether both have the same tokens; on a GPU the host waits for the answer."""
    found = _differences(student, teacher)
    return torch.equal(found, torch.zeros_like(found))


def _differences(student: TokenBatch, teacher: TokenBatch) -> Int[Tensor, ""]:
    """Places at which real tokens differ. How far and with what a tokenizer pads is no difference."""
    length = min(student.ids.shape[1], teacher.ids.shape[1])
    in_both = student.mask[:, :length] & teacher.mask[:, :length]
    ids = (student.ids[:, :length] != teacher.ids[:, :length]) & in_both
    in_one = student.mask[:, :length] ^ teacher.mask[:, :length]
    return ids.sum() + in_one.sum() + student.mask[:, length:].sum() + teacher.mask[:, length:].sum()


def _cannot_be_matched(student: TokenBatch, teacher: TokenBatch) -> ValueError:
    without = " and ".join(
        role for role, batch in (("student's", student), ("teacher's", teacher)) if batch.spans is None
    )
    return ValueError(
        f"student and teacher split the texts differently, and the {without} tokenizer does not say which "
        "characters its tokens stand for, so their tokens cannot be matched: leave levels L1 and L2 out (L3 and L4 "
        "need no match), or use a tokenizer with offsets (a fast one, in transformers). A method of your own that "
        "matches words says so in `matches_words`."
    )


def _numbers(
    student: Int[Tensor, "batch student_tokens 2"], teacher: Int[Tensor, "batch teacher_tokens 2"]
) -> tuple[Int[Tensor, "batch student_tokens"], Int[Tensor, "batch teacher_tokens"], Bool[Tensor, "batch both_tokens"]]:
    """Words as groups of overlapping spans, found in one pass over the tokens of both, sorted by where they start.

    Returns:
        The number of each token's word, and which groups are words: both models have tokens in them.
    """
    spans = torch.cat([student, teacher], dim=1).long()
    real = spans[..., 1] > spans[..., 0]
    starts, order = torch.where(real, spans[..., 0], _NOWHERE).sort(dim=1, stable=True)
    reached = torch.where(real, spans[..., 1], 0).gather(1, order).cummax(dim=1).values
    opens = torch.ones_like(starts, dtype=torch.bool)
    opens[:, 1:] = starts[:, 1:] >= reached[:, :-1]
    groups = torch.empty_like(order).scatter_(1, order, opens.long().cumsum(1) - 1)
    of_student, of_teacher = groups.split([student.shape[1], teacher.shape[1]], dim=1)
    in_student, in_teacher = real.long().split([student.shape[1], teacher.shape[1]], dim=1)
    members = torch.zeros_like(groups)
    shared = (members.scatter_add(1, of_student, in_student) > 0) & (members.scatter_add(1, of_teacher, in_teacher) > 0)
    numbers = (shared.long().cumsum(1) - 1).masked_fill(~shared, -1)
    of_tokens = numbers.gather(1, groups).masked_fill(~real, -1)
    of_student, of_teacher = of_tokens.split([student.shape[1], teacher.shape[1]], dim=1)
    return of_student, of_teacher, shared

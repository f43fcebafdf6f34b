"""The language hierarchy: tokens, phrases and sentences of a text tower, and words that two tokenizers share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cmapkd.data.types import TokenBatch
from cmapkd.features.pyramid import check_known, check_same_levels, pooled
from cmapkd.models.types import Level, LevelInfo

_NOWHERE = torch.iinfo(torch.long).max // 2  # where tokens without characters are sorted to


def token_level(level: Level) -> tuple[Float[Tensor, "batch tokens width"], Bool[Tensor, "batch tokens"]]:
    """L1: the hidden states as they are, and which of them are real tokens (start and end tokens included)."""
    if level.layout != "tokens" or level.num_prefix:
        raise ValueError(
            f"a level of layout {level.layout!r} with {level.num_prefix} prefix tokens is not a text tower's: use the "
            "visual pyramid for it."
        )
    if level.mask is None:
        return level.values, torch.ones(level.values.shape[:2], dtype=torch.bool, device=level.values.device)
    return level.values, level.mask


def sentence_level(level: Level) -> Float[Tensor, "batch width"]:
    """L3: the mean over a level's real tokens; float32 or wider."""
    token_level(level)  # refuses what is no text
    return pooled(level)


def phrases(
    values: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"], *, window: int = 3
) -> tuple[Float[Tensor, "batch phrases width"], Bool[Tensor, "batch phrases"]]:
    """Means over `window` successive real tokens, one for every place where such a window starts.

    Args:
        values: hidden states, or words of `pool_words`.
        mask: True where a token is real. Tokens on both sides of a gap are neighbours.
        window: > 0, in tokens; at most as many as there are real ones, so that a short text is one phrase.
    Returns:
        Phrases, float32 or wider, zeros where there is none; and where there is one. There are max(tokens - window, 0)
        + 1 places. A text without real tokens has no phrase.
    Raises:
        ValueError: the window is not positive.
    """
    if window < 1:
        raise ValueError(f"a phrase is a window of at least one token, got {window}")
    order = mask.long().argsort(dim=1, descending=True, stable=True)  # real ones to the front, in their order
    real = values.masked_fill(~mask[..., None], 0).gather(1, order[..., None].expand_as(values))
    missing = window - values.shape[1]
    if missing > 0:
        real = nn.functional.pad(real, (0, 0, 0, missing))
    dtype = torch.promote_types(values.dtype, torch.float32)
    sums = real.unfold(1, window, 1).sum(-1, dtype=dtype)
    num_tokens = mask.sum(1, keepdim=True)
    starts = torch.arange(sums.shape[1], device=mask.device)
    found = starts <= (num_tokens - window).clamp_min(0)
    found = found & (num_tokens > 0)
    means = sums / num_tokens.clamp(1, window)[..., None]
    return means.masked_fill(~found[..., None], 0), found


def aligned_words(
    student: TokenBatch, teacher: TokenBatch
) -> tuple[Int[Tensor, "batch student_tokens"], Int[Tensor, "batch teacher_tokens"], int]:
    """Numbers the pieces of text that both models' tokens can be pooled to.

    The same tokens in both: every real token is a piece of its own, start and end tokens included. Otherwise a word is
    a smallest run of characters that no token of either model crosses the ends of and that both have tokens in; start
    and end tokens belong to none. Reads one number back from the device: call it before the towers run.

    Returns:
        The word number of each of the student's tokens, of each of the teacher's, -1 where it belongs to none; and how
        many words the longest text has. A text's words are numbered from 0, without gaps, in their order.
    Raises:
        ValueError: the tokens differ and a tokenizer gave no character spans, or the batches differ in size.
    """
    if len(student.ids) != len(teacher.ids):
        raise ValueError(
            f"the student has {len(student.ids)} texts, the teacher {len(teacher.ids)}: row i of both must be the same"
        )
    if (
        student.ids.shape == teacher.ids.shape
        and torch.equal(student.ids, teacher.ids)
        and torch.equal(student.mask, teacher.mask)
    ):
        numbers = (student.mask.long().cumsum(1) - 1).masked_fill(~student.mask, -1)
        return numbers, numbers, int(numbers.max()) + 1
    if student.spans is None or teacher.spans is None:
        without = " and ".join(
            role for role, batch in (("student's", student), ("teacher's", teacher)) if batch.spans is None
        )
        raise ValueError(
            f"student and teacher split the texts differently, and the {without} tokenizer does not say which "
            "characters its tokens stand for, so their tokens cannot be matched: leave levels L1 and L2 out (L3 and L4 "
            "need no match), or use a tokenizer with offsets (a fast one, in transformers)."
        )
    return _numbers(student.spans, teacher.spans)


def pool_words(
    values: Float[Tensor, "batch tokens width"], word_of_token: Int[Tensor, "batch tokens"], num_words: int
) -> tuple[Float[Tensor, "batch words width"], Bool[Tensor, "batch words"]]:
    """Means over the tokens of each word.

    Args:
        values: hidden states of one model.
        word_of_token: its word numbers from `aligned_words`, -1 for tokens that are left out.
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


class LanguageProjectors(nn.Module):
    """The student's side of the hierarchy: a linear map to the teacher's width at each level."""

    def __init__(self, student: Mapping[str, LevelInfo], teacher: Mapping[str, LevelInfo]) -> None:
        """Projectors for the levels of two `language_taps`.

        Raises:
            ValueError: the two have not the same levels.
        """
        super().__init__()
        check_same_levels(student, teacher)
        self.linear = nn.ModuleDict({name: nn.Linear(student[name].width, teacher[name].width) for name in student})

    def forward(
        self, levels: Mapping[str, Float[Tensor, "batch *tokens width"]]
    ) -> dict[str, Float[Tensor, "batch *tokens teacher_width"]]:
        """Tokens, words, phrases or sentences by level name, in the teacher's width, not standardised.

        Raises:
            ValueError: a level has no projector.
        """
        check_known(levels, self.linear, "projector")
        return {name: self.linear[name](values) for name, values in levels.items()}


def _numbers(
    student: Int[Tensor, "batch student_tokens 2"], teacher: Int[Tensor, "batch teacher_tokens 2"]
) -> tuple[Tensor, Tensor, int]:
    """Words as groups of overlapping spans, found in one pass over the tokens of both, sorted by where they start."""
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
    return of_student, of_teacher, int(shared.sum(1).max())

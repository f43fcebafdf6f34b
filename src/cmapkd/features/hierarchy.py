"""The language hierarchy: tokens, phrases and sentences of a text tower."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cmapkd.features.pyramid import check_known, check_same_levels, pooled
from cmapkd.models.types import Level, LevelInfo


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
    exists = starts <= (num_tokens - window).clamp_min(0)
    exists = exists & (num_tokens > 0)
    means = sums / num_tokens.clamp(1, window)[..., None]
    return means.masked_fill(~exists[..., None], 0), exists


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

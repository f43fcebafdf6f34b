"""What a draft is worth: how many tokens of it a teacher keeps at a time, and how much faster the teacher writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import Field

from cmapkd.config import Config
from cmapkd.data.dialogues import ChatInput
from cmapkd.evaluation.efficiency import wait_for
from cmapkd.models.drafting import write_with_draft
from cmapkd.models.generative import Decoding, GenerativeModel

T = TypeVar("T")


class DraftingConfig(Config):
    """How drafts propose tokens, and how much is written with them."""

    proposals: int = Field(5, ge=1, description="Tokens that a draft proposes at a time.")
    samples: int | None = Field(
        64, ge=1, description="Most dialogues that are written, one at a time, with and without drafts; none: all."
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """A text that a teacher wrote with a draft, beside the one that it writes alone.

    Attributes:
        tokens: of the text, its end token among them.
        passes, proposed, accepted: as of `Drafted`.
        seconds, alone: with the draft, and without.
        gap: where the texts differ, by how much the teacher prefers the one token to the other at their first
            difference, in nats; None where all tokens are the same.
    """

    tokens: int
    passes: int
    proposed: int
    accepted: int
    seconds: float
    alone: float
    gap: float | None


def compare_texts(
    teacher: GenerativeModel,
    inputs: ChatInput,
    drafts: Sequence[tuple[GenerativeModel, ChatInput]],
    how: Decoding,
    *,
    proposals: int,
) -> list[Comparison]:
    """One dialogue, written greedily by the teacher alone and then with each draft.

    Args:
        inputs: the dialogue as the teacher reads it; beside each draft as that one does. All on the models' device.
    """
    (own,), alone = _timed(inputs, lambda: teacher.generate(inputs, how))
    found = []
    for draft, draft_inputs in drafts:
        drafted, seconds = _timed(
            inputs,
            lambda: write_with_draft(teacher, draft, inputs, draft_inputs, how, proposals=proposals),  # noqa: B023
        )
        gap = _gap(teacher, inputs, own, drafted.ids)
        found.append(Comparison(len(drafted.ids), *drafted[1:], seconds, alone, gap))
    return found


def _timed(inputs: ChatInput, write: Callable[[], T]) -> tuple[T, float]:
    device = inputs.texts.ids.device
    wait_for(device)
    start = time.perf_counter()
    written = write()
    wait_for(device)
    return written, time.perf_counter() - start


@torch.no_grad()
def _gap(teacher: GenerativeModel, inputs: ChatInput, own: Sequence[int], drafted: Sequence[int]) -> float | None:
    """By how much the teacher prefers its own token where two texts differ first; None: they do not."""
    if list(own) == list(drafted):
        return None
    place = next(place for place, (one, other) in enumerate(zip(own, drafted, strict=False)) if one != other)
    features = teacher(inputs.with_answers([own[: place + 1]]))
    logits = teacher.logits(features.hidden["answer"].values[-1:])[0]
    return abs(float(logits[own[place]] - logits[drafted[place]]))


def summary(found: Sequence[Comparison]) -> dict[str, Any]:
    """Sums over all texts, divided once.

    Returns:
        `accepted_length`, tokens written in one pass of the teacher, its own one among them (1 alone, at most one more
        than proposals); `accepted_share`, percent of proposed tokens that stayed; `passes_per_token` of the teacher;
        `same_texts`, percent of texts that are the teacher's own token for token, with `num_different` and, of these,
        the `widest_gap` in nats; `speed`, seconds of the teacher alone as a multiple of those with the draft.
    """
    tokens, passes, proposed, accepted = (
        sum(getattr(each, name) for each in found) for name in ("tokens", "passes", "proposed", "accepted")
    )
    seconds, alone = sum(each.seconds for each in found), sum(each.alone for each in found)
    gaps = [each.gap for each in found if each.gap is not None]
    return {
        "accepted_length": tokens / passes,
        "accepted_share": 100 * accepted / proposed if proposed else None,
        "passes_per_token": passes / tokens,
        "same_texts": 100 * (1 - len(gaps) / len(found)),
        "num_different": len(gaps),
        "widest_gap": max(gaps, default=None),
        "speed": alone / seconds,
        "seconds": seconds,
        "seconds_alone": alone,
        "num_texts": len(found),
        "num_tokens": tokens,
    }

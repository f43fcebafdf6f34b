"""Yes and no as first tokens of a model that writes."""

from __future__ import annotations

from collections.abc import Mapping

from cmapkd.models.generative import GenerativeModel

SPELLINGS = {"yes": ("yes", "Yes"), "no": ("no", "No")}
"""Answers whose first tokens count as yes and as no."""


def first_tokens(model: GenerativeModel) -> Mapping[str, list[int]] | None:
    """The tokens that begin yes and no; those that begin both are left out. None where none are left of either."""
    first = {
        word: {model.processor.encode_answer(spelling)[0] for spelling in spellings}
        for word, spellings in SPELLINGS.items()
    }
    both = first["yes"] & first["no"]
    if first["yes"] <= both or first["no"] <= both:
        return None
    return {word: sorted(ids - both) for word, ids in first.items()}

"""A small model that writes, with the table of words and the head of a larger one of the same width."""

from __future__ import annotations

import torch

from cmapkd.config import ConfigError
from cmapkd.models.generative import GenerativeModel


@torch.no_grad()
def take_words(model: GenerativeModel, other: GenerativeModel) -> list[str]:
    """Copies the table of words and the head of `other` into `model`, for all tokens that `other` can write.

    Returns:
        The names of the parameters of `model` that hold them.
    Raises:
        ConfigError: their widths differ, or only one of them has one table for both.
    """
    pairs: list[tuple[str, str]] = []
    for part in ("embeddings", "head"):
        own, theirs = sorted(model.parts[part]), sorted(other.parts[part])
        if len(own) != len(theirs):
            raise ConfigError(
                f"{model.name} has {len(own)} parameters in its {part}, and {other.name} {len(theirs)}: one of the two "
                "reads and writes words by one table"
            )
        pairs += zip(own, theirs, strict=True)
    size = other.vocabulary.size
    for name, source in pairs:
        mine, known = model.get_parameter(name), other.get_parameter(source)
        if mine.shape[1:] != known.shape[1:]:
            raise ConfigError(
                f"words are {mine.shape[-1]} numbers wide in {model.name}, and {known.shape[-1]} in {other.name}"
            )
        mine[:size] = known[:size].to(mine)
    return [name for name, _ in pairs]

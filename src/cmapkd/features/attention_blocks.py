"""What texts attend to in pictures, cut out of a language model's attention maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatInput
from cmapkd.features.visual_rows import beside
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import Rows

Block = Float[Tensor, "heads texts tokens"]


def heads_of(model: GenerativeModel, layer: int) -> int:
    """How many attention maps a layer has.

    Raises:
        ConfigError: there is no such layer, or its maps cannot be read.
    """
    if layer >= len(model.text_levels):
        raise ConfigError(f"method.layer is {layer}, and {model.name} has layers 0 to {len(model.text_levels) - 1}")
    if model.attention_heads is None:
        raise ConfigError(
            f"attention maps of {model.name} cannot be read, because it computes attention by "
            f"{model.attention or 'means of its own'}: load it with sdpa, or leave attention out"
        )
    return model.attention_heads


def text_to_vision(attention: Float[Tensor, "batch heads length length"], inputs: ChatInput) -> list[Block | None]:
    """Of each dialogue what its texts behind the picture attend to in the picture; None where there is no picture."""
    blocks: list[Tensor | None] = []
    for maps, visual, real in zip(attention, inputs.visual, inputs.texts.mask, strict=True):
        seen = visual.nonzero().flatten()
        if not len(seen):
            blocks.append(None)
            continue
        texts = real.nonzero().flatten()
        texts = texts[texts > seen[-1]].to(maps.device, non_blocking=True)
        blocks.append(maps[:, texts][:, :, seen.to(maps.device, non_blocking=True)])
    return blocks


def paired(student: Sequence[Block | None], teacher: Sequence[Block | None]) -> list[tuple[Block, Block]]:
    """The blocks of both models for each dialogue with a picture, the teacher's over as many tokens as the student's.

    Where grids of visual tokens differ, the attention that all of them get together stays.

    Raises:
        ValueError: the numbers of visual tokens differ, and are not both squares.
    """
    pairs = []
    for own, theirs in zip(student, teacher, strict=True):
        if own is not None and theirs is not None:
            pairs.append((own, _over(theirs, own.shape[-1])))
    return pairs


def looked_at(attention: Float[Tensor, "batch heads length length"], inputs: ChatInput) -> Float[Tensor, " visual"]:
    """How much each visual token is attended to by the tokens of its dialogue: mean over heads, sum over queries."""
    real = inputs.texts.mask.to(attention.device, non_blocking=True)
    sums = (attention.mean(1) * real[:, :, None]).sum(1)
    sample, place = (each.to(attention.device, non_blocking=True) for each in inputs.visual.nonzero(as_tuple=True))
    return sums[sample, place]


def _over(attention: Block, tokens: int) -> Block:
    number = attention.shape[-1]
    if number == tokens:
        return attention
    flat = attention.flatten(0, 1).T
    nobody = torch.zeros(number, dtype=torch.long, device=flat.device)
    values = beside(Rows(flat, nobody, nobody), [tokens], [number])
    spread: Tensor = (number / tokens * values).T.unflatten(0, attention.shape[:2])
    return spread

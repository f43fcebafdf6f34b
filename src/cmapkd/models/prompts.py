"""Learned tokens beside a frozen tower's own: through the blocks of an image tower, and among the words of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.models.base import DualEncoder
from cmapkd.models.block_hooks import block_hooks
from cmapkd.models.texts import evaluating

PUBLISHED_DEPTH = 9  # layers of 12 with prompts of their own, IVLP and PromptKD


class DeepPrompts(nn.Module):
    """`count` tokens for each of the first `depth` blocks; the last ones go on through the blocks behind.

    A block's prompts take the place of what the block before made of its own. Outside the blocks nobody sees them:
    they join behind the tower's tokens where a block begins and leave where it ends, so levels, norms and pooling are
    the tower's own, whichever library it comes from.

    Source: Jia et al. 2022, "Visual Prompt Tuning", arXiv:2203.12119 (deep prompts).
    """

    def __init__(self, width: int, *, depth: int, count: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(depth, count, width) * 0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed, as timm's modules list theirs."""
        return {"tokens"}

    @contextmanager
    def inside(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """While the context is open, the blocks work with the prompts."""
        depth, count, _ = self.tokens.shape
        carried: list[Tensor] = []

        def join(number: int) -> Any:
            def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                x: Float[Tensor, "batch tokens width"] = inputs[0]
                prompts = self.tokens[number].expand(x.shape[0], -1, -1) if number < depth else carried[0]
                return (torch.cat([x, prompts.to(x.dtype)], dim=1), *inputs[1:])

            return hook

        def leave(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            x: Tensor = output[0] if isinstance(output, tuple) else output
            carried[:] = [x[:, -count:]]
            return (x[:, :-count], *output[1:]) if isinstance(output, tuple) else x[:, :-count]

        joins = {block: join(number) for number, block in enumerate(blocks)}
        with block_hooks(after=dict.fromkeys(blocks, leave), before=joins):
            yield


def make_prompts(model: DualEncoder, *, depth: int | None, count: int) -> DeepPrompts:
    """Prompts for a model's image tower.

    Args:
        depth: blocks with prompts of their own; None: 9, or all of fewer.
    Raises:
        ValueError: the tower is no plain transformer, or has fewer blocks.
    """
    blocks = model.image_blocks
    if not blocks:
        raise ValueError(
            f"the image tower of {model.name} takes no prompts: they are tokens beside a ViT's own, and it is no plain "
            "ViT (convolutional, windowed, or with positions inside its blocks). Choose a ViT as student, for example "
            "open_clip:ViT-B-32 or tiny:base."
        )
    if depth is not None and depth > len(blocks):
        raise ValueError(
            f"prompts are asked for in {depth} blocks, but the image tower of {model.name} has {len(blocks)}"
        )
    width = model.image_levels[0].width
    prompts = DeepPrompts(width, depth=min(depth or PUBLISHED_DEPTH, len(blocks)), count=count)
    size, device = model.image_spec.size, model.log_logit_scale.device
    try:  # a tower may count its tokens where nobody told us
        with evaluating(model, device, None), prompts.to(device).inside(blocks):
            model.encode_image(model.log_logit_scale.new_zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, IndexError) as error:
        raise ValueError(
            f"the image tower of {model.name} does not work with more tokens than its own: {error}"
        ) from None
    return prompts


class TextPrompts(nn.Module):
    """`count` vectors in the place of the embeddings of as many tokens of every text, from place `first` on.

    The tokens there are placeholders, see `prompted.PromptedTokenizer`. Outside the embedding nobody sees the vectors:
    positions, masks, blocks and pooling are the tower's own, whichever library it comes from.

    Source: Zhou et al. 2022, "Learning to Prompt for Vision-Language Models" (CoOp), arXiv:2109.01134, section 3.2.
    """

    def __init__(self, width: int, *, count: int, first: int) -> None:
        super().__init__()
        self.first = first
        self.tokens = nn.Parameter(torch.randn(count, width) * 0.02)

    def no_weight_decay(self) -> set[str]:
        """As `DeepPrompts` says it."""
        return {"tokens"}

    @contextmanager
    def inside(self, embedding: nn.Module) -> Iterator[None]:
        """While the context is open, the embedding of tokens gives the vectors."""
        first, behind = self.first, self.first + len(self.tokens)

        def put(_module: nn.Module, _inputs: Any, x: Float[Tensor, "batch tokens width"]) -> Tensor:
            vectors = self.tokens.to(x.dtype).expand(x.shape[0], -1, -1)
            return torch.cat([x[:, :first], vectors, x[:, behind:]], dim=1)

        with block_hooks(after={embedding: put}):
            yield

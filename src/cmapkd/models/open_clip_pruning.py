"""open_clip's plain transformers taken apart, and made smaller than its configs can say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmapkd.models.prunable import BlockNames, PrunableTower, TowerSizes
from cmapkd.models.types import Tower


class SlimAttention(nn.Module):
    """Self-attention whose heads need not fill the width, with the names of `nn.MultiheadAttention`; batch first."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * heads * head_width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * heads * head_width))
        self.out_proj = nn.Linear(heads * head_width, width)

    def forward(
        self,
        query: Tensor,
        _key: Tensor,
        _value: Tensor,
        need_weights: bool = False,  # noqa: ARG002  as it is called; there are none
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        batch, tokens, _ = query.shape
        fused = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = fused.view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def prunable_towers(model: Any) -> dict[Tower, PrunableTower]:
    """The towers of an open_clip model that are plain transformers."""
    towers: dict[Tower, PrunableTower] = {}
    if (image := _image_tower(model)) is not None:
        towers["image"] = image
    if (text := _text_tower(model)) is not None:
        towers["text"] = text
    return towers


def resize(model: Any, sizes: Mapping[Tower, TowerSizes]) -> None:
    """Cuts the towers of a model in place, to the first units of each kind: its weights are yet to be set."""
    for tower, parts in prunable_towers(model).items():
        wanted = sizes[tower]
        transformer = (model.visual if tower == "image" else getattr(model, "text", model)).transformer
        for block, heads in zip(transformer.resblocks, wanted.heads, strict=True):
            slim = SlimAttention(parts.channels.size, block.attn.num_heads, parts.head_width)
            slim.load_state_dict(block.attn.state_dict())
            slim.num_heads = heads
            block.attn = slim
        counts = {"channels": wanted.width}
        for kind, numbers in (("heads", wanted.heads), ("units", wanted.units)):
            counts |= {f"{kind}_{layer}": number for layer, number in enumerate(numbers)}
        for name, group in parts.groups.items():
            first = torch.arange(counts[name])
            for place in group.places:
                owner, _, kind = place.weight.rpartition(".")
                module = model.get_submodule(owner)
                weight = getattr(module, kind)
                cut = nn.Parameter(place.take(weight.detach(), first, group.size), weight.requires_grad)
                setattr(module, kind, cut)
        transformer.width = wanted.width
        for module in model.modules():
            _tell_sizes(module)


def _tell_sizes(module: Any) -> None:
    """A module's own idea of its sizes, after those of its weights; norms compute by it, others print it."""
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.Conv2d) and module.groups == 1:
        module.out_channels = module.weight.shape[0]


def _image_tower(model: Any) -> PrunableTower | None:
    from open_clip.transformer import VisionTransformer

    visual = model.visual
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None or visual.proj is None:
        return None
    norms = ["visual.ln_pre"] if isinstance(visual.ln_pre, nn.LayerNorm) else []
    return _tower(
        "visual.transformer",
        visual.transformer,
        writes={"visual.conv1.weight": 0, "visual.class_embedding": 0, "visual.positional_embedding": 1},
        reads={"visual.proj": 0},
        norms=[*norms, "visual.ln_post"],
    )


def _text_tower(model: Any) -> PrunableTower | None:
    """None also where attention is masked by head, which wants as many heads in every layer."""
    from open_clip.transformer import TextTransformer

    own = getattr(model, "text", model)
    prefix = "text." if own is not model else ""
    if own is not model and (not isinstance(own, TextTransformer) or own.cls_emb is not None or own.use_pad_mask):
        return None
    projection = own.text_projection
    if projection is None:
        return None
    linear = isinstance(projection, nn.Linear)
    return _tower(
        f"{prefix}transformer",
        own.transformer,
        writes={f"{prefix}token_embedding.weight": 1, f"{prefix}positional_embedding": 1},
        reads={f"{prefix}text_projection.weight": 1} if linear else {f"{prefix}text_projection": 0},
        norms=[f"{prefix}ln_final"],
    )


def _tower(
    name: str, transformer: Any, *, writes: Mapping[str, int], reads: Mapping[str, int], norms: list[str]
) -> PrunableTower | None:
    from open_clip.transformer import ResidualAttentionBlock

    blocks = list(transformer.resblocks)
    if not transformer.batch_first or not all(type(block) is ResidualAttentionBlock for block in blocks):
        return None
    sizes = TowerSizes(
        transformer.width,
        tuple(block.attn.num_heads for block in blocks),
        tuple(block.mlp.c_fc.out_features for block in blocks),
    )
    return PrunableTower.of(
        sizes,
        head_width=blocks[0].attn.head_dim,
        blocks=list(_block_names(f"{name}.resblocks", blocks)),
        writes=writes,
        reads=reads,
        norms=norms,
    )


def _block_names(name: str, blocks: list[Any]) -> Iterator[BlockNames]:
    for number, block in enumerate(blocks):
        own = f"{name}.{number}"
        yield BlockNames(
            norms=(f"{own}.ln_1", f"{own}.ln_2"),
            qkv=(f"{own}.attn.in_proj_weight", f"{own}.attn.in_proj_bias"),
            out=f"{own}.attn.out_proj",
            expand=f"{own}.mlp.c_fc",
            shrink=f"{own}.mlp.c_proj",
            vectors=tuple(
                f"{own}.{scale}.gamma" for scale in ("ls_1", "ls_2") if hasattr(getattr(block, scale), "gamma")
            ),
        )

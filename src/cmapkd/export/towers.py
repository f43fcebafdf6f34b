"""The two towers of any model as modules that can be exported: on a copy, with attention written out."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmapkd.data.types import TokenBatch
from cmapkd.export.narrow import Narrowed
from cmapkd.models import DualEncoder
from cmapkd.models.hf_model import HfModel
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.open_clip_levels import has_transformers_text
from cmapkd.models.open_clip_model import OpenClipModel
from cmapkd.models.open_clip_text import is_causal, pool_type
from cmapkd.models.parts_model import PartsModel
from cmapkd.models.tiny import TinyDualEncoder

EncodeText = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class TextRules:
    """What a text graph takes.

    Attributes:
        encode: ids and mask, Int[batch length] each, to embeddings.
        reads_mask: whether the graph has an `attention_mask`; causal towers that pool at the end token need none.
        any_length: whether texts may be shorter than `context_length`; else each is padded to it.
        end_id: the token that ends every text; None where texts have none.
        pad_id: what the model was trained to read behind it, where that counts and clients pad otherwise; else None.
    """

    encode: EncodeText
    reads_mask: bool
    any_length: bool
    end_id: int | None
    pad_id: int | None = None


class ImageGraph(nn.Module):
    """Pixels, normalised by the model's own preprocessing, to embeddings that are not normalised."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.model.encode_image(pixel_values).embedding


class TextGraph(nn.Module):
    """Token ids to embeddings that are not normalised.

    A text that lost its end token gets it back in its last place. transformers.js cuts long texts off as an array, end
    token included, and a tower that pools there would embed something else. For a tower that sees its padding, what
    stands behind the end token becomes the padding that it knows: CLIP's tokenizer pads with another id elsewhere.
    """

    def __init__(self, model: DualEncoder, rules: TextRules) -> None:
        super().__init__()
        self.model, self.rules = model, rules

    def forward(self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None) -> Tensor:
        if self.rules.end_id is not None:
            length = input_ids.shape[1]
            ended = (input_ids == self.rules.end_id).to(torch.int32).sum(1, keepdim=True) > 0
            last = torch.arange(length, device=input_ids.device)[None] == length - 1
            input_ids = torch.where(last & ~ended, self.rules.end_id, input_ids)
            if self.rules.pad_id is not None:
                ends = (input_ids == self.rules.end_id).to(torch.int64)
                input_ids = torch.where(ends.cumsum(1) > ends, self.rules.pad_id, input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.rules.encode(input_ids, mask)


class PlainAttention(nn.Module):
    """The weights of an `nn.MultiheadAttention`, batch first, through `scaled_dot_product_attention`.

    The library's own form transposes to [length, batch, width]. Its fp16 graphs crash onnxruntime 1.32.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width, bias = attention.embed_dim, attention.in_proj_bias is not None
        self.into = nn.ModuleList(nn.Linear(width, width, bias=bias) for _ in range(3))
        for number, layer in enumerate(self.into):
            own = slice(number * width, (number + 1) * width)
            layer.weight = nn.Parameter(attention.in_proj_weight[own].detach())
            if bias:
                layer.bias = nn.Parameter(attention.in_proj_bias[own].detach())
        self.out, self.heads = attention.out_proj, attention.num_heads

    def forward(
        self,
        query: Float[Tensor, "batch queries width"],
        key: Float[Tensor, "batch keys width"],
        value: Float[Tensor, "batch keys width"],
        need_weights: bool = False,  # noqa: ARG002  as it is called; there are none
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        inputs = zip(self.into, (query, key, value), strict=True)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, x in inputs)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out(attended.transpose(1, 2).flatten(2)), None


def exportable(model: DualEncoder) -> DualEncoder:
    """A copy in eval mode whose attention is written out; the model itself is left as it is."""
    copy = deepcopy(model).eval().requires_grad_(False)
    for joined in [each for each in copy.modules() if isinstance(each, JoinedEncoder)]:
        if joined.text is None:  # its frozen teacher is no module, and is not copied
            joined.text = exportable(joined.text_model)
    for module in list(copy.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.MultiheadAttention and child.batch_first and child._qkv_same_embed_dim:
                setattr(module, name, PlainAttention(child))
    return copy


def text_rules(model: DualEncoder) -> TextRules:
    """How this model's texts are exported. A family that is not ours takes a mask, and texts of any length."""
    if isinstance(model, JoinedEncoder):
        return text_rules(model.text_model)
    if isinstance(model, Narrowed):
        rules = text_rules(model.model)
        return replace(rules, encode=lambda ids, mask: model.narrow(rules.encode(ids, mask)))

    def own(ids: Tensor, mask: Tensor) -> Tensor:
        return model.encode_text(TokenBatch(ids, mask.bool())).embedding

    if isinstance(model, TinyDualEncoder):
        return TextRules(own, True, True, model.tokenizer.end_id)
    if isinstance(model, HfModel):
        return TextRules(own, False, model.model_type == "clip", model.tokenizer.native.eos_token_id)
    if isinstance(model, PartsModel):
        native = model.text.tokenizer.native
        last = native("a")["input_ids"][-1]  # only some tokenizers end a text by a token of its own
        return TextRules(own, True, True, last if last in (native.eos_token_id, native.sep_token_id) else None)
    if isinstance(model, OpenClipModel):
        end, inner = model.tokenizer.end_id, model.model
        any_length = model.whole_texts is None
        if has_transformers_text(inner):  # its mask is made of the padding's id
            return TextRules(own, False, any_length, end)
        tower = getattr(inner, "text", inner)
        if any_length and is_causal(tower):  # so it never sees what stands behind the end token, where it pools
            return TextRules(lambda ids, _: _causal_text(tower, ids), False, True, end)
        pads_with_zero = not hasattr(model.tokenizer.native, "tokenizer")  # open_clip's own tokenizer
        return TextRules(own, False, False, end, 0 if pads_with_zero else None)
    return TextRules(own, True, True, None)


def _causal_text(tower: Any, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
    """open_clip's causal text tower at any length; its own forward takes texts of full length only."""
    places = torch.arange(ids.shape[1], device=ids.device)
    x = tower.token_embedding(ids) + tower.positional_embedding[places]
    mask = torch.where(places[None, :] > places[:, None], float("-inf"), 0.0)
    x = tower.ln_final(tower.transformer(x, attn_mask=mask))
    end: Any = getattr(tower, "eos_id", None) or getattr(tower, "text_eos_id", None)
    pooled = ids if pool_type(tower) == "argmax" else torch.eq(ids, end)
    # int32: some runtimes have no ArgMax over int64
    x = x[torch.arange(x.shape[0], device=ids.device), pooled.to(torch.int32).argmax(-1)]
    projection = tower.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    embedding: Tensor = x
    return embedding

"""open_clip's native ViT and text transformer as transformers' `CLIPModel`: the same numbers under other names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from cmapkd.models.open_clip_model import OpenClipModel

_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_KINDS = ("weight", "bias")


def to_clip_model(model: OpenClipModel) -> Any:
    """A `transformers.CLIPModel` with copies of the weights, in eval mode.

    Raises:
        ValueError: the model has a part that `CLIPModel` has no form for; names it.
    """
    from transformers import CLIPConfig, CLIPModel

    if (problem := next(obstacles(model), None)) is not None:
        raise ValueError(f"{model.name} has no form in transformers: {problem}. Use --to onnx")
    visual = model.model.visual
    text = getattr(model.model, "text", model.model)
    shared = {"projection_dim": model.embed_dim}
    config = CLIPConfig(
        **shared,
        text_config={
            **_sizes(text.transformer),
            **shared,
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": model.tokenizer.context_length,
            "layer_norm_eps": text.ln_final.eps,
            "bos_token_id": model.tokenizer.native.sot_token_id,
            "eos_token_id": model.tokenizer.native.eot_token_id,
            "pad_token_id": model.tokenizer.native.eot_token_id,
        },
        vision_config={
            **_sizes(visual.transformer),
            **shared,
            "image_size": model.image_spec.size,
            "patch_size": visual.patch_size[0],
            "layer_norm_eps": visual.ln_post.eps,
        },
    )
    clip = CLIPModel(config).eval()
    clip.load_state_dict({name: tensor.detach().clone().contiguous() for name, tensor in _weights(model)})
    return clip


def obstacles(model: OpenClipModel) -> Iterator[str]:
    """What of a model `CLIPModel` cannot express, in words."""
    from open_clip.transformer import TextTransformer, VisionTransformer

    visual = model.model.visual
    text = getattr(model.model, "text", model.model)
    if type(visual) is not VisionTransformer:
        yield f"its image tower is a {type(getattr(visual, 'trunk', visual)).__name__}, not open_clip's own ViT"
        return
    if text is not model.model and type(text) is not TextTransformer:
        yield f"its text tower is a {type(text).__name__}, not open_clip's own"
        return
    if hasattr(model.tokenizer.native, "tokenizer"):
        yield "it reads texts by another tokenizer than CLIP's"
    if model.logit_bias is not None:
        yield "it has a logit bias"
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.proj is None:
        yield "its image tower does not project its class token"
    if getattr(visual, "final_ln_after_pool", False) or not isinstance(visual.ln_pre, nn.LayerNorm):
        yield "the norms of its image tower stand elsewhere"
    if text.attn_mask is None or getattr(text, "cls_emb", None) is not None:
        yield "its text tower is not causal"
    if text.text_projection is None or getattr(text.text_projection, "bias", None) is not None:
        yield "its text projection has a bias, or there is none"
    for block in (*visual.transformer.resblocks, *text.transformer.resblocks):
        if type(block.attn) is not nn.MultiheadAttention or not isinstance(block.ls_1, nn.Identity):
            yield "its blocks are not CLIP's: their attention was cut, or their branches are scaled"
            return


def _sizes(transformer: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu" if isinstance(block.mlp.gelu, nn.GELU) else "quick_gelu",
    }


def _weights(model: OpenClipModel) -> Iterator[tuple[str, Tensor]]:
    """transformers' names and the tensors that belong there."""
    own = model.model.state_dict()
    prefix = "text." if hasattr(model.model, "text") else ""
    yield "logit_scale", own["logit_scale"].reshape(())
    yield "vision_model.embeddings.class_embedding", own["visual.class_embedding"]
    yield "vision_model.embeddings.position_embedding.weight", own["visual.positional_embedding"]
    yield "vision_model.embeddings.patch_embedding.weight", own["visual.conv1.weight"]
    yield "visual_projection.weight", own["visual.proj"].T
    projection = own.get(f"{prefix}text_projection")
    yield "text_projection.weight", own[f"{prefix}text_projection.weight"] if projection is None else projection.T
    yield "text_model.embeddings.token_embedding.weight", own[f"{prefix}token_embedding.weight"]
    yield "text_model.embeddings.position_embedding.weight", own[f"{prefix}positional_embedding"]
    for kind in _KINDS:
        yield f"vision_model.pre_layrnorm.{kind}", own[f"visual.ln_pre.{kind}"]
        yield f"vision_model.post_layernorm.{kind}", own[f"visual.ln_post.{kind}"]
        yield f"text_model.final_layer_norm.{kind}", own[f"{prefix}ln_final.{kind}"]
    for mine, theirs, tower in (("visual.", "vision_model", model.model.visual), (prefix, "text_model", None)):
        blocks = (getattr(model.model, "text", model.model) if tower is None else tower).transformer.resblocks
        for number in range(len(blocks)):
            yield from _block(own, f"{mine}transformer.resblocks.{number}", f"{theirs}.encoder.layers.{number}")


def _block(own: dict[str, Tensor], mine: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    for kind in _KINDS:
        for letter, part in zip("qkv", own[f"{mine}.attn.in_proj_{kind}"].chunk(3), strict=True):
            yield f"{theirs}.self_attn.{letter}_proj.{kind}", part
        for name, other in _BLOCK.items():
            yield f"{theirs}.{other}.{kind}", own[f"{mine}.{name}.{kind}"]

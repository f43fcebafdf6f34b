"""Folders of a `PartsModel`: open_clip's own format where open_clip can say the model, else ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from cmapkd.models.heads import AnyHead, Head
from cmapkd.models.image_tower import ImageTower
from cmapkd.models.image_towers import VisualTower
from cmapkd.models.storage import WEIGHTS, read_weights, write_model_folder, write_tensors
from cmapkd.models.text_towers import TextTower

NATIVE_CONFIG, NATIVE_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_ENCODERS = ("bert", "roberta", "xlm-roberta")  # that open_clip builds with the pooling asked for
_POOLERS = {"mean": "mean_pooler", "class": "cls_last_hidden_state_pooler"}


class Joined(Protocol):
    """What a folder needs to know of a `PartsModel`."""

    name: str
    embed_dim: int
    image: ImageTower
    text: TextTower
    image_head: AnyHead
    text_head: AnyHead

    @property
    def logit_bias(self) -> Tensor | None: ...

    def describe(self) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, Tensor]: ...


def save(model: Joined, folder: Path) -> None:
    """Writes description, weights, and what the towers are built from."""
    config = native_config(model)
    options = {**model.describe(), "form": "cmapkd" if config is None else "open_clip"}
    frozen = {"image": model.image.freezing(), "text": model.text.freezing()}
    if any(any(each) if isinstance(each, list) else each for each in frozen.values()):
        options["frozen"] = frozen  # for who reads the folder: a loaded model learns whole
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    write_model_folder(
        folder, family="parts", name=model.name, options=options, weights=weights if config is None else None
    )
    model.image.save_config(folder)
    model.text.save_config(folder)
    if config is not None:
        (folder / NATIVE_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        names = native_names(model)
        write_tensors(folder / NATIVE_WEIGHTS, {_renamed(key, names): tensor for key, tensor in weights.items()})


def read(model: Joined, folder: Path, *, form: str) -> dict[str, Tensor]:
    """The weights of a folder that `save` wrote, under our names.

    Args:
        model: like the one that was saved.
    """
    if form == "cmapkd":
        return read_weights(folder / WEIGHTS)
    theirs = {native: ours for ours, native in native_names(model).items()}
    return {_renamed(key, theirs): tensor for key, tensor in read_weights(folder / NATIVE_WEIGHTS).items()}


def native_config(model: Joined) -> dict[str, Any] | None:
    """`open_clip_config.json` of the model; None where open_clip cannot build it.

    It can where a timm tower's pooled features go into a linear head without bias or an mlp of its own shape, and a
    BERT or RoBERTa pooled by mean or class token into the same without any bias. open_clip reads the encoder's config
    from where it came from, so that must be the main branch of a hub repository: a folder is not everybody's.
    """
    image, text = model.image, model.text
    if not isinstance(image, VisualTower) or not image.headless or text.pooling not in _POOLERS:
        return None
    tokenizer, encoder, source = text.tokenizer.native, text.config, text.hub_id
    if (
        source is None
        or image.visual.trunk.num_features != image.width  # a head of timm's own widens the features
        or encoder.model_type not in _ENCODERS
        or encoder.pad_token_id != tokenizer.pad_token_id  # open_clip takes its mask from the config's
        or not _says(model.image_head, hidden=2 * model.embed_dim, bias=model.image_head.config.kind == "mlp")
        or not _says(model.text_head, hidden=(text.width + model.embed_dim) // 2, bias=False)
    ):
        return None
    vision = {**image.config["vision_cfg"], "timm_proj": model.image_head.config.kind}
    config: dict[str, Any] = {
        "embed_dim": model.embed_dim,
        "vision_cfg": {**vision, "timm_drop": model.image_head.config.dropout},
        "text_cfg": {
            "hf_model_name": source,
            "hf_tokenizer_name": source,
            "hf_model_pretrained": False,
            "hf_pooler_type": _POOLERS[text.pooling],
            "hf_proj_type": model.text_head.config.kind,
            "context_length": text.tokenizer.context_length,
        },
        "custom_text": True,
    }
    if model.logit_bias is not None:
        config["init_logit_bias"] = 0.0
    size = [image.spec.size, image.spec.size]
    return {"model_cfg": config, "preprocess_cfg": {**image.preprocess, "size": size}}


def native_names(model: Joined) -> dict[str, str]:
    """Beginnings of our parameters' names, and what open_clip calls them."""
    heads = {
        "mlp": ("visual.head.mlp.fc1.", "visual.head.mlp.fc2.", "text.proj.0.", "text.proj.2."),
        "linear": ("", "visual.head.proj.", "", "text.proj."),
    }
    image, text = heads[model.image_head.config.kind], heads[model.text_head.config.kind]
    names = {"image_head.hidden.": image[0], "image_head.out.": image[1]}
    names |= {"text_head.hidden.": text[2], "text_head.out.": text[3]}
    names |= {"image.visual.": "visual.", "text.transformer.": "text.transformer.", "learned_bias": "logit_bias"}
    return {ours: native for ours, native in names.items() if native}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """The name with the longest beginning that is known exchanged."""
    start = max((start for start in names if key.startswith(start)), key=len, default="")
    return names.get(start, "") + key.removeprefix(start)


def _says(head: AnyHead, *, hidden: int, bias: bool) -> bool:
    """Whether open_clip's own head has this one's shape."""
    if not isinstance(head, Head):
        return False
    if head.config.kind == "linear":
        return head.out.bias is None
    return head.hidden.out_features == hidden and (head.hidden.bias is not None) == bias

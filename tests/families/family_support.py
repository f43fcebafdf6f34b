"""Every model family as a small random model in its library's real format. A new family is one line of `FAMILIES`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from model_support import randomise, save_word_tokenizer

from cmapkd.methods import Method
from cmapkd.models import DualEncoder, ModelConfig, build_model
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.prompts import make_prompts
from helpers import make_method, make_model, make_teacher

SHORT = 12
"""The context length of the families' texts, where a test asks for no other."""
CLIP_TEXT = {"context_length": SHORT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
TIMM_VIT = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 48}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
HF_VISION = {**SIZES, "image_size": 32, "patch_size": 8}


@dataclass(frozen=True, slots=True)
class Family:
    """How one is made.

    Attributes:
        make: writes what it needs into a new folder and builds the model from it, for texts of so many tokens.
    """

    make: Callable[[Path, int], DualEncoder]


def open_clip(folder: Path, **config: Any) -> DualEncoder:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.json"
    path.write_text(json.dumps({"embed_dim": 16, **config}), encoding="utf-8")
    return build_model(f"open_clip:{path}")


def with_transformers_text(folder: Path, length: int = SHORT) -> DualEncoder:
    """open_clip's `CustomTextCLIP` of a timm image tower and a RoBERTa."""
    from transformers import RobertaConfig

    settings = RobertaConfig(
        vocab_size=20,
        max_position_embeddings=length + 28,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    )
    settings.save_pretrained(folder / "text")
    save_word_tokenizer(folder / "words")
    text = {"hf_model_name": str(folder / "text"), "hf_tokenizer_name": str(folder / "words"), "hf_proj_type": "mlp"}
    return open_clip(folder, vision_cfg=TIMM_VIT, text_cfg={**text, "context_length": length})


def parts(folder: Path, length: int = SHORT) -> DualEncoder:
    """A convolutional image tower and a BERT, joined by two heads of different kinds."""
    from transformers import BertConfig, BertModel

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=20, max_position_embeddings=length + 28, pad_token_id=0, **none, **SIZES)
    BertModel(config).save_pretrained(folder)
    save_word_tokenizer(folder)
    image = {"name": "timm:test_efficientnet", "image_size": 64}
    text = {"name": f"hf:{folder}", "context_length": length}
    options = {"image": image, "text": text, "image_head": "mlp", "text_head": "reader", "embed_dim": 16}
    return build_model(ModelConfig(name="parts:small", options=options))


def timm(folder: Path, length: int = SHORT) -> DualEncoder:
    """An image tower with batch norms beside CLIP's text tower."""
    options = {"embed_dim": 16, "text_width": 32, "text_layers": 1, "text_heads": 2, "context_length": length}
    return build_model(ModelConfig(name="timm:mobilenetv3_small_050", options={**options, "image_size": 64}))


def hf_clip(folder: Path, length: int = SHORT) -> DualEncoder:
    import transformers

    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": length, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=HF_VISION, projection_dim=16)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.3] * 3
    )
    return _hf(folder, transformers.CLIPModel(config), processor, pad="[PAD]")


def hf_siglip(folder: Path, length: int = SHORT) -> DualEncoder:
    import transformers

    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": length}
    config = transformers.SiglipConfig(text_config=text, vision_config=HF_VISION)
    processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    return _hf(folder, transformers.SiglipModel(config), processor, pad="</s>")


def _hf(folder: Path, model: Any, processor: Any, *, pad: str) -> DualEncoder:
    save_word_tokenizer(folder, pad=pad)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return build_model(f"hf:{folder}")


def tiny(folder: Path, length: int = SHORT) -> DualEncoder:
    return make_model(context_length=length)


def joined(folder: Path, length: int = SHORT) -> DualEncoder:
    """A prompted image tower and a projector with a batch norm, in a teacher's space."""
    student = make_model()
    torch.manual_seed(0)
    prompts = make_prompts(student, depth=1, count=2)
    return JoinedEncoder(student, make_teacher(context_length=length), projector="two_layer", prompts=prompts)


FAMILIES: dict[str, Family] = {
    "tiny": Family(tiny),
    "open_clip": Family(
        lambda folder, length: open_clip(folder, vision_cfg=VIT, text_cfg={**CLIP_TEXT, "context_length": length})
    ),
    "open_clip RN50-like": Family(
        lambda folder, length: open_clip(folder, vision_cfg=RESNET, text_cfg={**CLIP_TEXT, "context_length": length})
    ),
    "timm": Family(timm),
    "timm, SigLIP": Family(
        lambda folder, length: open_clip(
            folder,
            vision_cfg=TIMM_VIT,
            text_cfg={
                **CLIP_TEXT,
                "context_length": length,
                "no_causal_mask": True,
                "pool_type": "last",
                "proj_bias": True,
            },
            custom_text=True,
            init_logit_bias=-10,
        )
    ),
    "timm, transformers text": Family(with_transformers_text),
    "hf CLIP": Family(hf_clip),
    "hf SigLIP": Family(hf_siglip),
    "parts": Family(parts),
    "joined": Family(joined),
}


def make(name: str, folder: Path, length: int = SHORT) -> DualEncoder:
    """The family's model, for texts of so many tokens; the same weights at every call."""
    torch.manual_seed(0)
    model = FAMILIES[name].make(folder, length)
    randomise(model)
    return model


def method_for(student: DualEncoder, name: str = "contrastive", **settings: Any) -> Method:
    """A method whose student is the model, in training mode."""
    return make_method(name, student=student, settings=settings).train()


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers, also of the buffers that no file holds."""
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def is_averaged(name: str, model: nn.Module) -> bool:
    """Whether a tensor of the student belongs in an average: weights, and what batch norms measure."""
    return name in dict(model.named_parameters()) or name.endswith(("running_mean", "running_var"))

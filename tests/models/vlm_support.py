"""Tiny random image-text models that write, one of each family, in transformers' own classes and processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from model_support import randomise
from PIL import Image

from cmapkd.data.dialogues import ChatInput, Dialogue, Turn, join_items
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.hf_vlm_build import processor_of
from cmapkd.models.tiny_vlm_words import byte_tokenizer, template_of

TEXTS = ("Is there a red circle?", "yes", "no", "How many squares are there?", "2", "a red circle and a blue square")
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"image_size": 64, "patch_size": 16}
SIDE = {"height": 64, "width": 64}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}  # sums to half of a head
PACKED = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 16, "spatial_merge_size": 2}
PACKED |= {"temporal_patch_size": 2}


def words(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """A language model's sizes; its head has more rows than there are tokens, as many published ones have."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    rows = {"vocab_size": len(tokenizer) + 5, "max_position_embeddings": 256, "num_key_value_heads": 2}
    return {**sizes, **tokens, **rows, **more}


def tokenizer(*special: str, **named: str) -> Any:
    return byte_tokenizer(TEXTS * 4, size=320, special=special, **named)


def llava() -> tuple[Any, Any]:
    import transformers as library

    tokens = tokenizer("<image>", image_token="<image>")
    config = library.LlavaConfig(
        vision_config=library.SiglipVisionConfig(**VIT, vision_use_head=False),
        text_config=library.Qwen2Config(**words(tokens)),
        image_token_index=tokens.image_token_id,
        image_seq_length=16,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    processor = library.LlavaProcessor(
        library.SiglipImageProcessor(size=SIDE),
        tokens,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=template_of("<image>"),
    )
    return library.LlavaForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    """With Idefics3's processor: SmolVLM's own needs num2words, and gives the same for pictures."""
    return _nested("SmolVLM")


def idefics3() -> tuple[Any, Any]:
    return _nested("Idefics3")


def _nested(kind: str) -> tuple[Any, Any]:
    import importlib

    import transformers as library

    cells = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
    tokens = tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *cells)
    module = importlib.import_module(f"transformers.models.{kind.lower()}.configuration_{kind.lower()}")
    config = getattr(library, f"{kind}Config")(
        vision_config=getattr(module, f"{kind}VisionConfig")(**VIT),
        text_config=library.LlamaConfig(**words(tokens)),
        scale_factor=2,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
    )
    pixels = library.Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False
    )
    processor = library.Idefics3Processor(pixels, tokens, image_seq_len=4, chat_template=template_of("<image>"))
    return getattr(library, f"{kind}ForConditionalGeneration")(config), processor


def qwen2() -> tuple[Any, Any]:
    return _qwen("qwen2_vl", "Qwen2VL", {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 64})


def qwen2_5() -> tuple[Any, Any]:
    more = {"intermediate_size": 64, "window_size": 64, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
    return _qwen("qwen2_5_vl", "Qwen2_5_VL", more)


def qwen3() -> tuple[Any, Any]:
    more = {"intermediate_size": 64, "out_hidden_size": 64, "num_position_embeddings": 64}
    more["deepstack_visual_indexes"] = [0, 1]  # type: ignore[assignment]
    return _qwen("qwen3_vl", "Qwen3VL", more)


def _qwen(module: str, kind: str, vision: dict[str, Any]) -> tuple[Any, Any]:
    import importlib

    import transformers as library

    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokens = tokenizer(*names, image_token=names[2], video_token=names[3])
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    configs = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    rope = {**ROPE, "mrope_interleaved": True} if kind == "Qwen3VL" else ROPE
    more = {"head_dim": 16} if kind == "Qwen3VL" else {}
    config = getattr(library, f"{kind}Config")(
        vision_config=getattr(configs, f"{kind}VisionConfig")(**{**PACKED, **vision}),
        text_config=getattr(configs, f"{kind}TextConfig")(**words(tokens, rope_parameters=rope, **more)),
        **dict(zip(keys, tokens.convert_tokens_to_ids(list(names)), strict=True)),
    )
    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    pixels = library.Qwen2VLImageProcessor(**sizes, size={"shortest_edge": 32**2, "longest_edge": 96**2})
    video = library.Qwen3VLVideoProcessor if kind == "Qwen3VL" else library.Qwen2VLVideoProcessor
    template = template_of("<|vision_start|><|image_pad|><|vision_end|>")
    processor = getattr(library, f"{kind}Processor")(pixels, tokens, video(**sizes), chat_template=template)
    return getattr(library, f"{kind}ForConditionalGeneration")(config), processor


def internvl() -> tuple[Any, Any]:
    import transformers as library

    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokens = tokenizer(*names.values(), "<video>", **names, video_token="<video>")
    config = library.InternVLConfig(
        vision_config=library.InternVLVisionConfig(**VIT),
        text_config=library.Qwen2Config(**words(tokens)),
        image_token_id=tokens.context_image_token_id,
        image_seq_length=4,
    )
    processor = library.InternVLProcessor(
        library.GotOcr2ImageProcessor(size=SIDE),
        tokens,
        library.InternVLVideoProcessor(size=SIDE),
        image_seq_length=4,
        chat_template=template_of("<IMG_CONTEXT>"),
    )
    return library.InternVLForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    import transformers as library

    tokens = tokenizer("<boi>", "<eoi>", "<soft>", boi_token="<boi>", eoi_token="<eoi>", image_token="<soft>")
    text = words(tokens, head_dim=16, query_pre_attn_scalar=16, sliding_window=64)
    config = library.Gemma3Config(
        vision_config=library.SiglipVisionConfig(**VIT, vision_use_head=False),
        text_config=library.Gemma3TextConfig(**text),
        mm_tokens_per_image=4,
        boi_token_index=tokens.boi_token_id,
        eoi_token_index=tokens.eoi_token_id,
        image_token_index=tokens.image_token_id,
    )
    pixels = library.Gemma3ImageProcessor(size=SIDE)
    template = template_of("<boi>")
    processor = library.Gemma3Processor(pixels, tokens, image_seq_length=4, chat_template=template)
    model = library.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)  # zeros at first
    return model, processor


MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "qwen2_vl": qwen2,
    "qwen2_5_vl": qwen2_5,
    "qwen3_vl": qwen3,
    "internvl": internvl,
    "gemma3": gemma3,
}


def make_vlm(kind: str, **settings: Any) -> HfVlm:
    """A tiny model of that `model_type` with random weights, in eval mode."""
    torch.manual_seed(0)
    model, native = MAKERS[kind]()
    randomise(model)
    processor = processor_of(native, model.config, name=kind, **settings)
    return HfVlm(model, processor=processor, name=kind).eval()


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def asked(question: str, answer: str, pictures: int = 1) -> Dialogue:
    return (Turn("user", question, pictures=pictures), Turn("assistant", answer))


DIALOGUES: Sequence[tuple[Dialogue, list[Image.Image]]] = (
    (asked(TEXTS[0], "yes"), [picture(0)]),
    (asked(TEXTS[3], "a red circle and 2 squares"), [picture(1, 64, 96)]),
    (asked("Is 2 more than 1?", "yes", pictures=0), []),
)


def chat(model: HfVlm, which: Sequence[int] = (0, 1, 2)) -> ChatInput:
    """Some of `DIALOGUES` as a batch; the last of all has no picture."""
    items = [model.processor.read(*DIALOGUES[number]) for number in which]
    return join_items(items, model.processor.pad_id)

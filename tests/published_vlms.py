"""Published image-text models that write, with random weights: real widths and heads, a layer or two, few tokens.

The vocabulary is a small one learned from a few texts, with the special tokens that each family's processor needs: the
real tables of 32,000 to 152,000 rows are most of such a model's memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmapkd.models.tiny_vlm_words import byte_tokenizer, template_of

TEXTS = ("Is there a red circle?", "yes", "no", "How many squares are there?", "2", "a red circle and a blue square")
LONGEST = 512


def save_pair(kind: str, folder: Path) -> tuple[str, str]:
    """Names of a teacher and a student of a family, in two new folders."""
    names = []
    for role in ("teacher", "student"):
        model, processor = _MAKERS[kind](role == "teacher")
        model.save_pretrained(folder / role)
        processor.save_pretrained(folder / role)
        names.append(f"hf:{folder / role}")
    return names[0], names[1]


def _language(tokens: Any, width: int, inner: int, heads: int, key_heads: int, rows: int = 0) -> dict[str, Any]:
    return {
        "vocab_size": len(tokens) + rows,  # heads of one family often differ in rows that belong to no token
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": LONGEST,
        "pad_token_id": tokens.pad_token_id,
        "eos_token_id": tokens.eos_token_id,
        "bos_token_id": None,
    }


def _qwen2_5_vl(large: bool) -> tuple[Any, Any]:
    """Qwen2.5-VL 7B and 3B (arXiv:2502.13923, table 1)."""
    import transformers as library

    configs = importlib.import_module("transformers.models.qwen2_5_vl.configuration_qwen2_5_vl")
    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokens = byte_tokenizer(TEXTS * 4, size=320, special=special, image_token=special[2], video_token=special[3])
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    sizes = _language(tokens, *((3584, 18944, 28, 4, 128) if large else (2048, 11008, 16, 2)))
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    config = library.Qwen2_5_VLConfig(
        vision_config=configs.Qwen2_5_VLVisionConfig(
            depth=1,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            fullatt_block_indexes=[0],
            out_hidden_size=sizes["hidden_size"],
        ),
        text_config=configs.Qwen2_5_VLTextConfig(**sizes, rope_parameters=rope),
        tie_word_embeddings=not large,
        **dict(zip(keys, tokens.convert_tokens_to_ids(list(special)), strict=True)),
    )
    pixels = library.Qwen2VLImageProcessor(size={"shortest_edge": 56**2, "longest_edge": 84**2})
    template = template_of("<|vision_start|><|image_pad|><|vision_end|>")
    processor = library.Qwen2_5_VLProcessor(pixels, tokens, library.Qwen2VLVideoProcessor(), chat_template=template)
    return library.Qwen2_5_VLForConditionalGeneration(config), processor


def _smolvlm(large: bool) -> tuple[Any, Any]:
    """SmolVLM2 2.2B and 256M (arXiv:2504.05299), with Idefics3's processor: their own needs num2words."""
    import transformers as library

    module = importlib.import_module("transformers.models.smolvlm.configuration_smolvlm")
    special = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    tokens = byte_tokenizer(TEXTS * 4, size=320, special=special)
    width, inner, heads, side, patch, factor = (1152, 4304, 16, 378, 14, 3) if large else (768, 3072, 12, 512, 16, 4)
    sizes = _language(tokens, *((2048, 8192, 32, 32) if large else (576, 1536, 9, 3)))
    config = library.SmolVLMConfig(
        vision_config=module.SmolVLMVisionConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=1,
            num_attention_heads=heads,
            image_size=side,
            patch_size=patch,
        ),
        text_config=library.LlamaConfig(**sizes),
        scale_factor=factor,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
    )
    square = {"longest_edge": side}
    pixels = library.Idefics3ImageProcessor(size=square, max_image_size=square, do_image_splitting=False)
    visual = (side // patch // factor) ** 2
    template = importlib.import_module("transformers.models.smolvlm.processing_smolvlm").DEFAULT_CHAT_TEMPLATE
    return library.SmolVLMForConditionalGeneration(config), library.Idefics3Processor(
        pixels, tokens, image_seq_len=visual, chat_template=template
    )


def _llava(large: bool) -> tuple[Any, Any]:
    """LLaVA-1.5 7B (arXiv:2310.03744), and the same tower before TinyLlama's language model."""
    import transformers as library

    tokens = byte_tokenizer(TEXTS * 4, size=320, special=("<image>",), image_token="<image>")
    side, patch = 112, 14  # 64 visual tokens in place of 576
    sizes = _language(tokens, *((4096, 11008, 32, 32, 62) if large else (2048, 5632, 32, 4)))
    config = library.LlavaConfig(
        vision_config=library.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=2,  # features are those of the last but one
            num_attention_heads=16,
            image_size=side,
            patch_size=patch,
        ),
        text_config=library.LlamaConfig(**sizes),
        image_token_index=tokens.image_token_id,
        image_seq_length=(side // patch) ** 2,
    )
    processor = library.LlavaProcessor(
        library.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokens,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template_of("<image>"),
    )
    return library.LlavaForConditionalGeneration(config), processor


_MAKERS: dict[str, Callable[[bool], tuple[Any, Any]]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "smolvlm": _smolvlm,
    "llava": _llava,
}
PUBLISHED = tuple(_MAKERS)

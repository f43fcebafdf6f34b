"""Real pairs at 224 px, a few steps each through all of `run`: other library, other tokenizer, CNN student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmapkd import distill, load

DATA = {"train": "scenes?size=224&length=64", "val": "scenes@val?size=224&length=8"}


@pytest.mark.slow
def test_open_clip_vit_teaches_a_resnet50(tmp_path: Path) -> None:
    result = distill(
        teacher="open_clip:ViT-B-32",
        student="open_clip:RN50",
        data=DATA,
        method="clip_kd",
        training={"steps": 2, "batch_size": 4},
        out=tmp_path / "run",
        quiet=True,
    )
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 2
    assert {"terms/contrastive", "terms/feature", "terms/relational", "terms/interactive"} <= steps[-1].keys()
    assert result.metrics["teacher"]["params"] > result.metrics["student"]["params"]
    assert load(tmp_path / "run").image_spec.size == 224


@pytest.mark.slow
def test_transformers_teacher_with_its_own_tokenizer(tmp_path: Path) -> None:
    teacher = _save_transformers_clip(tmp_path / "teacher")
    distill(
        teacher=f"hf:{teacher}",
        student="open_clip:ViT-B-32",
        data=DATA,
        method="hinton",
        training={"steps": 2, "batch_size": 4},
        out=tmp_path / "run",
        quiet=True,
    )
    teacher_model, student_model = load(f"hf:{teacher}"), load(tmp_path / "run")
    text = ["three red circles"]
    assert teacher_model.tokenizer(text).ids.tolist() != student_model.tokenizer(text).ids.tolist()


def _save_transformers_clip(folder: Path) -> Path:
    """A small CLIP with random weights, a word tokenizer and a processor, in the files that transformers writes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    words = ["<pad>", "<start>", "<end>", "<unk>", "three", "red", "circles", "a", "the", "object", "blue", "square"]
    rust = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        model_max_length=32,
    )
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = CLIPConfig(
        text_config={
            **text,
            "vocab_size": len(words),
            "max_position_embeddings": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={**text, "image_size": 224, "patch_size": 32},
        projection_dim=48,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder

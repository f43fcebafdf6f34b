from __future__ import annotations

import pytest
import torch
from model_support import inputs

from cmapkd.data.types import TokenBatch
from cmapkd.models import DualEncoder, LevelRequest, build_model

pytestmark = pytest.mark.slow


def every_level(model: DualEncoder) -> LevelRequest:
    return LevelRequest(tuple(i.name for i in model.image_levels), tuple(i.name for i in model.text_levels))


@pytest.mark.parametrize(
    ("name", "embed_dim", "layout", "shapes"),
    [
        ("ViT-B-16", 512, "tokens", [(3, 197, 768)] * 12),
        ("RN50", 1024, "map", [(3, 256, 56, 56), (3, 512, 28, 28), (3, 1024, 14, 14), (3, 2048, 7, 7)]),
    ],
)
@torch.no_grad()
def test_open_clip_at_224_pixels(name: str, embed_dim: int, layout: str, shapes: list[tuple[int, ...]]) -> None:
    model = build_model(f"open_clip:{name}")
    assert model.image_spec.size == 224
    output = model(inputs(model), every_level(model))
    assert output.image.embedding.shape == output.text.embedding.shape == (3, embed_dim)
    assert [tuple(level.values.shape) for level in output.image.levels.values()] == shapes
    assert {level.layout for level in output.image.levels.values()} == {layout}
    assert [tuple(level.values.shape) for level in output.text.levels.values()] == [(3, 77, 512)] * 12


@torch.no_grad()
def test_transformers_clip_at_224_pixels() -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from cmapkd.models.hf_model import HfModel, HfTokenizer

    class Numbers:
        """In place of CLIP's vocabulary, which is not ours to ship."""

        eos_token_id = 49407

        def __len__(self) -> int:
            return 49408

    model = HfModel(
        CLIPModel(CLIPConfig()).eval(),  # the default config is ViT-B/32
        tokenizer=HfTokenizer(Numbers(), context_length=77),
        processor=CLIPImageProcessor(),
        name="hf:clip",
    )
    texts = TokenBatch(torch.randint(1, 49406, (3, 77)), torch.ones(3, 77, dtype=torch.bool))
    texts.ids[:, -1] = 49407
    needs = every_level(model)
    image = model.encode_image(torch.randn(3, 3, 224, 224), needs.image_levels)
    text = model.encode_text(texts, needs.text_levels)
    assert image.embedding.shape == text.embedding.shape == (3, 512)
    assert [tuple(level.values.shape) for level in image.levels.values()] == [(3, 50, 768)] * 12
    assert {(level.num_prefix, level.grid) for level in image.levels.values()} == {(1, (7, 7))}
    assert [tuple(level.values.shape) for level in text.levels.values()] == [(3, 77, 512)] * 12

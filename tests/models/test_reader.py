"""Reader heads: learned queries over the last tokens of every kind of tower, and towers that give none."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_support import check_contract, images, inputs
from test_parts_family import CONVOLUTIONAL, VIT, check_round_trip, parts, save_encoder, save_vit
from torch.autograd import gradcheck

from cmapkd.config import ConfigError
from cmapkd.models.heads import HeadConfig, Reader
from cmapkd.models.open_clip_levels import unpooled
from cmapkd.models.types import LAST, Level, LevelInfo

READER = {"kind": "reader", "queries": 2, "heads": 2}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    return {kind: save_encoder(kind, root / kind) for kind in ("bert", "t5")}


def reader(**config: Any) -> Reader:
    torch.manual_seed(0)
    head = Reader(HeadConfig(kind="reader", **config), LevelInfo(LAST, 8, "tokens"), 5).double()
    with torch.no_grad():
        head.queries.mul_(50)  # so that some tokens count more than others
    return head


def test_the_formula_written_out() -> None:
    head = reader(queries=3, hidden=12, heads=2)
    tokens, mask = torch.randn(4, 6, 8).double(), torch.arange(6) < torch.tensor([6, 3, 1, 4])[:, None]
    expected = torch.zeros(4, 5).double()
    for row in range(4):
        real = F.layer_norm(tokens[row][mask[row]], (8,))
        keys, values = head.keys(real), head.values(real)
        read = []
        for query in head.queries:
            for part in (slice(0, 6), slice(6, 12)):
                scores = keys[:, part] @ query[part] / 6**0.5
                read.append(scores.softmax(0) @ values[:, part])
        expected[row] = head.out.weight @ torch.cat(read)
    found = head(Level(tokens, "tokens", mask=mask))
    torch.testing.assert_close(found, expected)
    other = tokens.masked_fill(~mask[..., None], 1e3)  # what stands in the padding is not read
    torch.testing.assert_close(head(Level(other, "tokens", mask=mask)), expected)
    cells = tokens.transpose(1, 2).unflatten(2, (2, 3))
    torch.testing.assert_close(head(Level(cells, "map")), head(Level(tokens, "tokens")))
    assert head(Level(tokens, "tokens", mask=torch.zeros_like(mask))).isfinite().all()


def test_gradients() -> None:
    head = reader(heads=2)
    tokens = torch.randn(2, 3, 8).double().requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert gradcheck(lambda values: head(Level(values, "tokens", mask=mask)), tokens)
    head(Level(tokens, "tokens", mask=mask)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_it_begins_near_the_mean_of_the_tokens() -> None:
    torch.manual_seed(0)
    head = Reader(HeadConfig(kind="reader"), LevelInfo(LAST, 128, "tokens"), 16)
    assert head.heads == 2
    tokens = torch.randn(3, 9, 128)
    mean = head.out(head.values(head.norm(tokens)).mean(1))
    assert (head(Level(tokens, "tokens")) - mean).norm() < 0.05 * mean.norm()


@pytest.mark.parametrize("image", ["timm ViT", "timm map", "open_clip ViT", "open_clip ResNet", "hf", "tiny"])
def test_every_image_tower_gives_its_tokens(image: str, encoders: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    if image == "hf":
        named: Any = f"hf:{save_vit(tmp_path / 'vit')}"
    elif image.startswith("open_clip"):
        vision: Any = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
        if image == "open_clip ResNet":
            vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
        text = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
        (tmp_path / "small.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
        named = f"open_clip:{tmp_path / 'small.json'}"
    else:
        named = {"timm ViT": VIT, "timm map": CONVOLUTIONAL, "tiny": "tiny:debug"}[image]
    model: Any = parts(encoders["bert"], named, image_head=READER, text_head="reader")
    check_contract(model)  # also with levels and without: one embedding
    assert check_round_trip(model, tmp_path / "saved")["form"] == "cmapkd"
    model.encode_image(images(model)).embedding.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.image_head.parameters())
    learning = [p for name, p in model.named_parameters() if name in model.parts["image"]]
    assert sum(parameter.grad is not None for parameter in learning) > len(learning) // 2
    assert "image_head.queries" in model.no_weight_decay()


@torch.no_grad()
def test_timm_and_transformers_tokens_are_the_last_ones(encoders: dict[str, Path]) -> None:
    for named in (VIT, CONVOLUTIONAL):
        model: Any = parts(encoders["bert"], named, image_head="reader")
        trunk, pixels = model.image.visual.trunk, images(model)
        whole = trunk.forward_features(pixels)
        for levels in ((), tuple(level.name for level in model.image_levels)):
            torch.testing.assert_close(model.image(pixels, (*levels, LAST)).levels[LAST].values, whole)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_texts_are_read_without_their_padding(kind: str, encoders: dict[str, Path], tmp_path: Path) -> None:
    model: Any = parts(encoders[kind], text_head=READER)
    model.text_head.queries.mul_(50)
    batch = inputs(model)
    together = model.encode_text(batch.texts).embedding
    alone = [model.encode_text(model.tokenizer([text])).embedding for text in ("a red square", "a")]
    torch.testing.assert_close(together[[0, 2]], torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert check_round_trip(model, tmp_path / "saved")["text_head"]["queries"] == 2


def test_towers_without_tokens_and_wrong_settings_are_refused(encoders: dict[str, Path]) -> None:
    trunk = SimpleNamespace(num_features=6, output_fmt="NHWC")
    assert unpooled(trunk, torch.zeros(2, 3, 5, 6), "it").values.shape == (2, 6, 3, 5)
    for given, told in (([torch.zeros(1, 4, 6)], "several"), (torch.zeros(1, 1, 6), r"shape \(1, 6\)")):
        with pytest.raises(ConfigError, match=f"it gives .*{told}.* set image_head to linear or mlp"):
            unpooled(trunk, given, "it")
    with pytest.raises(ConfigError, match=r"timm:pit_ti_224 gives features of shape \(1, 256\) before it pools"):
        parts(encoders["bert"], "timm:pit_ti_224", image_head="reader")
    with pytest.raises(ConfigError, match="a reader of 32 channels cannot have 5 heads"):
        parts(encoders["bert"], text_head={"kind": "reader", "heads": 5})
    with pytest.raises(ConfigError, match="queries belongs to a reader, and this head is mlp"):
        parts(encoders["bert"], text_head={"kind": "mlp", "queries": 5})
    with pytest.raises(ConfigError, match="leave bias out"):
        parts(encoders["bert"], text_head={"kind": "reader", "bias": True})

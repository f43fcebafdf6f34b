"""Weights cut from a larger model: which, against the published code, and what cannot be cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cmapkd.config import ConfigError
from cmapkd.models import ModelConfig, build_model, load_model
from cmapkd.models.inherit import chosen_layers, inherit_weights, inherited
from cmapkd.models.tiny import TinyDualEncoder, TinyOptions
from helpers import make_model, tokenizer

# Numbers of the authors' `weight_inherit`; the file names commit and conditions.
PUBLISHED = json.loads((Path(__file__).parents[1] / "methods" / "fixtures" / "tinyclip.json").read_text())["inherited"]


def tiny(*, vision: int = 64, text: int = 64, depth: int = 2, seed: int = 0, **options: Any) -> TinyDualEncoder:
    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 8, "stem_width": 4, "embed_dim": 16, "context_length": 12}
    sizes |= {"vision_width": vision, "text_width": text, "vision_depth": depth, "text_depth": depth, **options}
    torch.manual_seed(seed)
    return TinyDualEncoder(TinyOptions(**sizes), tokenizer(), name=f"tiny-{vision}")


LAST_LAYERS = {  # how a weight of the student's last layer is named at its end, and the one it comes from
    "vit": {"blocks.1.attn.proj.weight": "blocks.2.attn.proj.weight"},
    "hf": {f"layers.1.self_attn.{x}.weight": f"layers.2.self_attn.{x}.weight" for x in ("q_proj", "out_proj")},
    "resnet": {"layer2.1.conv2.weight": "layer2.2.conv2.weight"},
}


@pytest.mark.parametrize(
    ("kept", "of", "uniform", "official"),
    [
        (6, 12, [0, 2, 4, 7, 9, 11], [0, 2, 4, 6, 8, 10]),
        (9, 12, [0, 1, 3, 4, 6, 7, 8, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 3, [0], [0]),
        (3, 3, [0, 1, 2], [0, 1, 2]),
        (2, 5, [0, 4], [0, 2]),
    ],
)
def test_layers_by_either_rule(kept: int, of: int, uniform: list[int], official: list[int]) -> None:
    assert chosen_layers(kept, of, "uniform") == uniform
    assert chosen_layers(kept, of, "official") == official


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case['layers']} layers")
def test_slices_are_those_of_the_published_code(case: dict[str, Any]) -> None:
    from open_clip.transformer import Transformer

    source: nn.Module = Transformer(width=case["of_width"], layers=case["of_layers"], heads=case["of_heads"]).double()
    numbered = {
        name: (torch.arange(weight.numel(), dtype=torch.float64) / weight.numel() + place).reshape(weight.shape)
        for place, (name, weight) in enumerate(source.state_dict().items())
    }
    source.load_state_dict(numbered)
    student: nn.Module = Transformer(width=case["width"], layers=case["layers"], heads=case["heads"]).double()
    found = inherited(student, source, depth="official")
    assert found.keys() == case["sums"].keys()
    for name, weight in found.items():
        weighted = (weight.flatten() * torch.arange(weight.numel(), dtype=torch.float64)).sum()
        assert [float(weight.sum()), float(weighted)] == pytest.approx(case["sums"][name], rel=1e-12), name


def test_heads_stay_whole() -> None:
    student, source = tiny(vision=64), tiny(vision=96, seed=1)
    inherit_weights(student, source)
    ours, theirs = student.vision.blocks[1].qkv, source.vision.blocks[1].qkv
    assert isinstance(ours, nn.Linear)
    assert isinstance(theirs, nn.Linear)
    for part in range(3):  # queries, keys, values: the first two heads of three
        assert torch.equal(ours.weight[64 * part : 64 * (part + 1)], theirs.weight[96 * part : 96 * part + 64, :64])
        assert torch.equal(ours.bias[64 * part : 64 * (part + 1)], theirs.bias[96 * part : 96 * part + 64])
    out = student.vision.blocks[1].out
    assert isinstance(out, nn.Linear)
    assert torch.equal(out.weight, source.vision.blocks[1].out.weight[:64, :64])  # type: ignore[index,union-attr]
    assert torch.equal(student.log_logit_scale, source.log_logit_scale)


@pytest.mark.parametrize("depth", ["uniform", "official"])
def test_an_equal_model_inherits_everything(depth: Any) -> None:
    student, source = tiny(depth=3), tiny(depth=3, seed=1)
    inherit_weights(student, source, depth=depth)
    for name, weight in source.state_dict().items():
        assert torch.equal(student.state_dict()[name], weight)


def test_layers_are_chosen_in_each_tower() -> None:
    source = tiny(vision=32, text=32, depth=5, seed=1)
    student = tiny(vision=32, text=32, depth=1, vision_depth=3)
    inherit_weights(student, source, depth="uniform")
    for mine, its in ((0, 0), (1, 2), (2, 4)):
        assert torch.equal(student.vision.blocks[mine].expand.weight, source.vision.blocks[its].expand.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(student.text.blocks[0].expand.weight, source.text.blocks[0].expand.weight)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": 128}, r"vision.class_token: \(1, 1, 128\) of \(1, 1, 96\) is no part of it"),
        ({"depth": 4}, r"the larger model has no vision.blocks.2"),
        ({"image_size": 32}, "another number of places in the picture"),
        ({"patch_size": 4}, "another number of places in the picture"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot inherit from tiny-96: .*{message}"):
        inherit_weights(tiny(**options), tiny(vision=96, depth=2, seed=1))


def test_another_library_or_vocabulary_is_refused() -> None:
    other = build_model("tiny:debug", captions=["a house under a tree", "two boats"] * 3)
    with pytest.raises(ValueError, match="they tokenise texts differently"):
        inherit_weights(tiny(), other)
    head = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="heads of width 2 instead of 4"):
        inherited(nn.MultiheadAttention(8, 4), nn.MultiheadAttention(8, 2))
    assert inherited(head, head).keys() == head.state_dict().keys()


# ------------------------------------------------------------------------------------------------ in a recipe


def test_a_student_by_config_begins_as_a_part_of_its_teacher(tmp_path: Path) -> None:
    teacher = build_model("tiny:scenes-teacher")
    values = {"name": "tiny:large", "options": {"vision_width": 96, "text_depth": 1}, "inherit": "teacher"}
    config = ModelConfig.from_mapping(values)
    assert config.model_dump(mode="json")["inherit"] == {"name": "teacher", "depth": "official"}
    student = build_model(config, captions=["a red circle"] * 4, teacher=teacher)
    assert isinstance(student, TinyDualEncoder)
    assert student.tokenizer.vocab_size == teacher.tokenizer.vocab_size
    assert torch.equal(student.text.tokens.weight, teacher.text.tokens.weight)  # type: ignore[union-attr,arg-type]
    student.save(tmp_path / "s")
    again = load_model(tmp_path / "s")  # a plain smaller model
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in student.state_dict().items())
    by_name = build_model(
        ModelConfig.from_mapping(values | {"inherit": {"name": "tiny:scenes-teacher", "depth": "uniform"}}),
        captions=["a red circle"] * 4,
    )
    last = "vision.blocks.4.out.bias"
    assert torch.equal(by_name.state_dict()[last], student.state_dict()[last])


def test_inheriting_is_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no teacher here"):
        build_model(ModelConfig.from_mapping({"name": "tiny:debug", "inherit": "teacher"}), captions=["a"] * 9)
    with pytest.raises(ConfigError, match="give one of the two"):
        ModelConfig.from_mapping({"name": "tiny:debug", "inherit": "teacher", "checkpoint": "x.safetensors"})
    make_model().save(tmp_path / "m")
    with pytest.raises(ConfigError, match="replace every weight of the trained model"):
        build_model(ModelConfig.from_mapping({"name": str(tmp_path / "m"), "inherit": "teacher"}), teacher=make_model())
    assert "inherit" not in ModelConfig.from_mapping("tiny:debug").model_dump(mode="json")


def test_towers_of_open_clip_inherit() -> None:
    import open_clip

    def clip(width: int, layers: int, text: int) -> nn.Module:
        vision = {"image_size": 32, "patch_size": 16, "width": width, "layers": layers, "head_width": 32}
        words = {"context_length": 8, "vocab_size": 50, "width": text, "heads": text // 32, "layers": layers}
        torch.manual_seed(width)
        return open_clip.CLIP(32, vision_cfg=vision, text_cfg=words)  # type: ignore[arg-type]

    small, large = clip(64, 2, 32), clip(96, 4, 64)
    small.load_state_dict(inherited(small, large, depth="uniform"))
    ours, theirs = small.state_dict(), large.state_dict()
    mine, its = (f"visual.transformer.resblocks.{layer}.attn.in_proj_weight" for layer in (1, 3))
    assert torch.equal(ours[mine][64:128], theirs[its][96:160, :64])  # keys of the first two heads
    assert torch.equal(ours["token_embedding.weight"], theirs["token_embedding.weight"][:, :32])
    with torch.no_grad():
        assert small(torch.randn(2, 3, 32, 32), torch.randint(0, 50, (2, 8)))[0].isfinite().all()


def test_other_libraries_towers_inherit_whole_heads() -> None:
    from open_clip.modified_resnet import ModifiedResNet
    from timm.models.vision_transformer import VisionTransformer
    from transformers import CLIPVisionConfig, CLIPVisionModel

    def vit(width: int, depth: int) -> nn.Module:
        return VisionTransformer(img_size=32, embed_dim=width, depth=depth, num_heads=width // 32, num_classes=8)

    def hf(width: int, depth: int) -> nn.Module:
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth, "image_size": 32}
        return CLIPVisionModel(CLIPVisionConfig(**sizes, num_attention_heads=width // 32, patch_size=16))

    def resnet(width: int, depth: int) -> nn.Module:
        return ModifiedResNet([depth] * 4, output_dim=16, heads=width // 2, image_size=64, width=width)

    pixels = torch.randn(2, 3, 64, 64)
    for make, small, large, side in ((vit, 64, 96, 32), (hf, 64, 96, 32), (resnet, 8, 12, 64)):
        torch.manual_seed(0)
        student, source = make(small, 2).eval(), make(large, 3).eval()
        student.load_state_dict(inherited(student, source, depth="uniform"))
        with torch.no_grad():
            student(pixels[..., :side, :side])
        ours, theirs = student.state_dict(), source.state_dict()
        for mine, its in LAST_LAYERS[make.__name__].items():
            (weight,) = (ours[name] for name in ours if name.endswith(mine))
            (whole,) = (theirs[name] for name in theirs if name.endswith(its))
            assert torch.equal(weight, whole[: len(weight), : weight.shape[1]]), mine

"""A prompted image tower beside another model's text tower: what prompts do, and that it is a model as others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import check_contract, check_round_trip, images, inputs, randomise
from test_hf_family import write as write_hf
from test_open_clip_family import small
from torch import Tensor, nn

from cmapkd.evaluation.efficiency import parameter_counts
from cmapkd.evaluation.suite import count_parameters
from cmapkd.evaluation.table import shown_parameters
from cmapkd.models import DualEncoder, FrozenTeacher, build_model, load_model
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.prompts import DeepPrompts, make_prompts
from cmapkd.models.tiny import TinyDualEncoder
from helpers import make_model, make_teacher


def a_model(kind: str, folder: Path) -> DualEncoder:
    if kind == "tiny":
        torch.manual_seed(0)
        return build_model("tiny:debug", captions=["a red square", "two blue circles"] * 9)
    if kind == "hf":
        write_hf("clip", folder)
        return build_model(f"hf:{folder}")
    folder.mkdir()
    return small(kind, folder)


def hooks(model: DualEncoder) -> list[int]:
    return [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in model.image_blocks]


PROMPTABLE = ["tiny", "vit", "vit_avg", "siglip", "hf"]


@torch.no_grad()
def by_hand(model: TinyDualEncoder, prompts: DeepPrompts, pixels: Tensor) -> Tensor:
    """The class token after blocks that see the prompts, as PromptKD's own towers do it: replaced, not accumulated."""
    tower, count = model.vision, prompts.tokens.shape[1]
    patches = tower.to_width(tower.stem(pixels)).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_token.expand(len(pixels), -1, -1), patches], dim=1) + tower.positions
    x = torch.cat([x, prompts.tokens[0].expand(len(pixels), -1, -1)], dim=1)
    for number, block in enumerate(tower.blocks):
        if 0 < number < len(prompts.tokens):
            x = torch.cat([x[:, :-count], prompts.tokens[number].expand(len(pixels), -1, -1)], dim=1)
        x = block(x)
    return tower.project(tower.norm(x[:, 0]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("depth", [1, 2])
def test_prompts_pass_through_the_blocks_as_published(depth: int) -> None:
    torch.manual_seed(0)
    model = build_model("tiny:debug", captions=["a red square", "two blue circles"] * 9)
    assert isinstance(model, TinyDualEncoder)
    prompts = make_prompts(model, depth=depth, count=3)
    with torch.no_grad():
        prompts.tokens.mul_(30)
        with prompts.inside(model.image_blocks):
            found = model.encode_image(images(model)).embedding
    torch.testing.assert_close(found, by_hand(model, prompts, images(model)))
    assert not torch.allclose(found, model.encode_image(images(model)).embedding)


@pytest.mark.parametrize("kind", PROMPTABLE)
def test_prompts_in_every_library(kind: str, tmp_path: Path) -> None:
    model = a_model(kind, tmp_path / "model")
    levels = tuple(info.name for info in model.image_levels)
    with torch.no_grad():
        plain = model.encode_image(images(model), levels)  # transformers puts hooks of its own there
    before = hooks(model)
    depth = max(1, len(model.image_blocks) - 1)  # the last block gets what the one before made of its prompts
    prompts = make_prompts(model, depth=depth, count=2)
    joined = JoinedEncoder(model, FrozenTeacher(model), projector="none", prompts=prompts)
    found = joined.encode_image(images(model), levels)
    assert found.embedding.shape == plain.embedding.shape
    assert not torch.allclose(found.embedding, plain.embedding, atol=1e-6)
    for name, level in plain.levels.items():
        assert found.levels[name].values.shape == level.values.shape
    found.embedding.square().sum().backward()
    assert prompts.tokens.grad is not None
    assert (prompts.tokens.grad.abs().amax((1, 2)) > 0).all()
    assert hooks(model) == before
    with torch.no_grad():
        assert torch.equal(model.encode_image(images(model)).embedding, plain.embedding)


def test_convolutional_towers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no prompts: they are tokens beside a ViT's own"):
        make_prompts(small("resnet", tmp_path), depth=None, count=4)


def test_depth_beyond_the_tower_is_refused() -> None:
    with pytest.raises(ValueError, match="asked for in 3 blocks, but the image tower of test-16 has 1"):
        make_prompts(make_model(), depth=3, count=4)
    assert make_prompts(make_model(), depth=None, count=4).tokens.shape == (1, 4, 32)


class Counting(nn.Module):
    """A block that knows how many tokens there are."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.positions = block, nn.Parameter(torch.zeros(5, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.positions)  # type: ignore[no-any-return]


def test_a_tower_that_counts_its_tokens_is_refused() -> None:
    model = make_model()
    model.vision.blocks[0] = Counting(model.vision.blocks[0])
    with pytest.raises(ValueError, match="does not work with more tokens than its own"):
        make_prompts(model, depth=1, count=4)


def joined_model(projector: Any = "two_layer", prompts: bool = True) -> JoinedEncoder:
    student, teacher = make_model(), make_teacher()
    torch.manual_seed(1)
    made = make_prompts(student, depth=1, count=2) if prompts else None
    model = JoinedEncoder(student, teacher, projector=projector, prompts=made)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize(("projector", "prompts"), [("two_layer", True), ("linear", False)])
def test_it_is_a_model_as_others(projector: str, prompts: bool, tmp_path: Path) -> None:
    model = joined_model(projector, prompts)
    check_contract(model)
    loaded = check_round_trip(model, tmp_path / "saved")
    assert loaded.num_parameters() == model.num_parameters()
    assert copy.deepcopy(model).text_model is model.text_model  # frozen, so an average may share it


def test_a_loaded_one_says_what_each_tower_costs(tmp_path: Path) -> None:
    model = joined_model()
    model.save(tmp_path)
    loaded = load_model(tmp_path)
    counts = parameter_counts(loaded, images(loaded), loaded.tokenizer(["a red cat"]))
    assert counts["total"] > loaded.num_parameters() == counts["image"] + counts["text"] + 1  # and the logit scale
    assert loaded.num_borrowed_parameters() == model.num_borrowed_parameters() == counts["text"]
    assert count_parameters(model) == {"params": loaded.num_parameters(), "params_borrowed": counts["text"]}
    assert shown_parameters(count_parameters(model)) == f"{counts['image'] + 1:,} + {counts['text']:,}"
    assert count_parameters(model.image) == {"params": model.image.num_parameters()}
    assert counts["text"] == sum(p.numel() for p in make_teacher().model.text.parameters())
    added = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("prompts.", "project.")))
    assert counts["image"] == added + sum(p.numel() for p in make_model().vision.parameters())


def test_texts_are_the_teachers_and_images_the_students() -> None:
    model = joined_model()
    batch = inputs(model)
    teacher = model.text_model
    assert torch.equal(model.encode_text(batch.texts).embedding, teacher.encode_text(batch.texts).embedding)
    assert model.image_spec == model.image.image_spec
    assert {key.split(".")[0] for key in model.state_dict()} == {"image", "prompts", "project"}


def test_widths_that_differ_need_a_projector() -> None:
    with pytest.raises(ValueError, match="embeds in 16 numbers and test-24 in 24"):
        JoinedEncoder(make_model(), make_teacher(), projector="none")

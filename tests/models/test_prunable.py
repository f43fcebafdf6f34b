"""Models with gates: against the forward pass written out, and against the smaller model that is left of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_support import check_contract, check_round_trip, images, inputs, randomise
from test_hf_family import write as write_hf
from test_open_clip_family import small
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.evaluation.efficiency import count_macs
from cmapkd.models import DualEncoder, build_model, load_model
from cmapkd.models.cut import cut
from cmapkd.models.gates import fixed_gates
from cmapkd.models.masked import MaskedEncoder
from cmapkd.models.open_clip_pruning import SlimAttention
from cmapkd.models.prunable import TowerSizes, UnitPlace
from cmapkd.models.tiny import TinyDualEncoder, TinyOptions
from helpers import tokenizer

SIZES = {"image": TowerSizes(64, (2, 2, 2), (256, 256, 256)), "text": TowerSizes(32, (2, 2, 2), (128, 128, 128))}


def tiny() -> TinyDualEncoder:
    torch.manual_seed(0)
    sizes = {"vision_width": 64, "text_width": 96, "vision_depth": 2, "text_depth": 2, "stem_width": 4}
    model = TinyDualEncoder(
        TinyOptions(image_size=16, patch_size=8, embed_dim=16, context_length=12, **sizes), tokenizer()
    )
    randomise(model)
    return model.eval()


def a_model(kind: str, folder: Path) -> DualEncoder:
    return tiny() if kind == "tiny" else small(kind, folder)


def masked(model: DualEncoder, seed: int = 0) -> MaskedEncoder:
    """With masks of which about half are off."""
    student = MaskedEncoder(model).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for log_alpha in student.masks.values():
            log_alpha.copy_(torch.randn(log_alpha.shape) * 2)
    return student


KINDS = ["tiny", "vit", "vit_avg"]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_gives_the_same(kind: str, tmp_path: Path) -> None:
    student = masked(a_model(kind, tmp_path))
    left, batch = student.shrunk(), inputs(student)
    full, ours, theirs = student.model(batch), student(batch), left(batch)
    for tower in ("image", "text"):
        mine, its, before = (getattr(each, tower).embedding for each in (ours, theirs, full))
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
        assert float((mine - before).abs().max()) > 1e-2
    assert left.num_parameters() < student.model.num_parameters()
    check_contract(left)
    sizes = {tower: parts.sizes for tower, parts in left.prunable.items()}
    assert any(len({*each.units}) > 1 for each in sizes.values())  # layers differ
    macs = [count_macs(each, lambda each=each: each.encode_image(images(each))) for each in (student.model, left)]
    assert macs[1] < 0.7 * macs[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_model_is_saved_as_one_of_its_family(kind: str, tmp_path: Path) -> None:
    student = masked(a_model(kind, tmp_path))
    left = student.shrunk()
    check_round_trip(left, tmp_path / "left")
    student.save(tmp_path / "student")
    loaded = load_model(tmp_path / "student")
    assert type(loaded) is type(student.model)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in left.state_dict().items())
    again = masked(loaded, seed=1).shrunk()  # once more, from a model that is no longer even
    assert again.num_parameters() < loaded.num_parameters()
    assert again.prunable["image"].sizes == load_after_saving(again, tmp_path / "again").prunable["image"].sizes


def load_after_saving(model: DualEncoder, folder: Path) -> DualEncoder:
    model.save(folder)
    return load_model(folder)


@torch.no_grad()
def by_hand(model: TinyDualEncoder, gates: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """TinyCLIP's forward pass: gates on activations, norms over the channels that are on."""
    tower, on = model.vision, gates["channels"]
    kept = on > 0

    def norm(x: Tensor, module: nn.Module) -> Tensor:
        y = torch.zeros_like(x)
        weight, bias = module.weight[kept], module.bias[kept]  # type: ignore[index]
        y[..., kept] = F.layer_norm(x[..., kept], (int(kept.sum()),), weight, bias)  # type: ignore[arg-type]
        return y

    patches = tower.to_width(tower.stem(pixels)).flatten(2).transpose(1, 2)
    x = (torch.cat([tower.class_token.expand(len(pixels), -1, -1), patches], dim=1) + tower.positions) * on
    for number, block in enumerate(tower.blocks):
        assert isinstance(block.heads, int)
        qkv = block.qkv(norm(x, block.norm_attention))  # type: ignore[operator,arg-type]
        q, k, v = qkv.unflatten(-1, (3, block.heads, 32)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v) * gates[f"heads_{number}"].view(-1, 1, 1)
        x = x + block.out(attended.transpose(1, 2).flatten(2)) * on  # type: ignore[operator]
        hidden = F.gelu(block.expand(norm(x, block.norm_mlp))) * gates[f"units_{number}"]  # type: ignore[operator,arg-type]
        x = x + block.shrink(hidden) * on  # type: ignore[operator]
    return tower.project(norm(x[:, 0], tower.norm))  # type: ignore[no-any-return]


def test_gates_act_where_the_published_model_has_them() -> None:
    student = masked(tiny())
    groups = student.prunable_towers["image"].groups
    gates = {name: fixed_gates(student.masks[f"image_{name}"]) for name in groups}
    assert isinstance(student.model, TinyDualEncoder)
    pixels = images(student)
    with torch.no_grad():
        found = student.encode_image(pixels).embedding
    torch.testing.assert_close(found, by_hand(student.model, gates, pixels), rtol=1e-4, atol=1e-5)


def test_draws_come_from_their_generator_and_hold_for_a_whole_step() -> None:
    one = masked(tiny()).train()
    other = copy.deepcopy(one)
    batch = inputs(one)
    found = []
    for student in (one, other):
        draws = torch.Generator().manual_seed(1)
        student.draw(draws)
        torch.rand(7)  # what else draws does not matter
        first = student(batch).image.embedding
        torch.testing.assert_close(first[:1], student.encode_image(batch.images[:1]).embedding)
        student.draw(draws)
        found.append([first, student(batch).image.embedding])
    assert all(torch.equal(mine, its) for mine, its in zip(*found, strict=True))
    assert not torch.allclose(*found[0], atol=1e-3)


def test_every_mask_and_weight_gets_a_gradient_in_a_step() -> None:
    student = masked(tiny()).train()
    student.draw(torch.Generator())
    output = student(inputs(student))
    (output.image.embedding.square().sum() + output.text.embedding.square().sum() + output.logit_scale).backward()
    missing = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    assert missing == []
    student.after_step()
    assert all(float(mask.detach().max()) <= 4.61 for mask in student.masks.values())
    assert copy.deepcopy(student).masks.keys() == student.masks.keys()  # nothing of the last draw is left


def test_hooks_are_gone_after_an_error() -> None:
    student = masked(tiny())
    with pytest.raises(RuntimeError):
        student.encode_image(torch.zeros(1, 1, 16, 16))
    assert not any(module._forward_hooks for module in student.modules())


def test_units_stand_where_their_place_says() -> None:
    weight = torch.arange(24.0).reshape(12, 2)  # two stretches of three units, two entries each
    place = UnitPlace("w", 0, entries=2, repeats=2)
    assert place.take(weight, torch.tensor([0, 2]), 3)[:, 0].tolist() == [0, 2, 8, 10, 12, 14, 20, 22]
    scaled = place.scale(torch.ones(12, 2), torch.tensor([1.0, 0.5, 0.0]))
    assert scaled[:, 1].tolist() == [1, 1, 0.5, 0.5, 0, 0] * 2


def test_all_units_are_the_model_itself() -> None:
    model = tiny()
    model.vision.class_token.requires_grad_(False)
    towers = model.prunable
    everything = {t: {n: torch.arange(g.size) for n, g in parts.groups.items()} for t, parts in towers.items()}
    same = cut(model, everything)
    assert all(torch.equal(same.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert [n for n, p in same.named_parameters() if not p.requires_grad] == ["vision.class_token"]
    matrices = [p.numel() for n, p in model.named_parameters() if "blocks." in n and p.ndim == 2]
    assert sum(parts.num_weights() for parts in towers.values()) == sum(matrices)


def test_slim_attention_is_torchs_where_both_can_be() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    ours = SlimAttention(24, 3, 8)
    ours.load_state_dict(theirs.state_dict())
    x, mask = torch.randn(2, 5, 24), torch.full((5, 5), float("-inf")).triu(1)
    for given in (None, mask):
        expected = theirs(x, x, x, need_weights=False, attn_mask=given)[0]
        torch.testing.assert_close(ours(x, x, x, need_weights=False, attn_mask=given)[0], expected)


def test_other_families_are_refused(tmp_path: Path) -> None:
    write_hf("clip", tmp_path / "hf")
    (tmp_path / "oc").mkdir()
    for model in (build_model(f"hf:{tmp_path / 'hf'}"), small("siglip", tmp_path / "oc"), small("resnet", tmp_path)):
        with pytest.raises(ValueError, match="cannot be pruned by masks: that takes a plain pre-norm ViT"):
            MaskedEncoder(model)
        assert not {"image", "text"} <= {*model.prunable}
    with pytest.raises(ValueError, match="cannot have towers of other sizes"):
        build_model(f"hf:{tmp_path / 'hf'}").resized(SIZES)


def test_tiny_says_what_sizes_it_cannot_have() -> None:
    assert TinyOptions(vision_width=50, vision_heads=(1, 2, 1, 1)).sizes("image") == TowerSizes(
        50, (1, 2, 1, 1), (200,) * 4
    )
    for options, message in (
        ({"vision_width": 50}, "vision_width must be a multiple of 32"),
        ({"text_heads": (1,)}, r"text_heads needs a number of at least 1 for each of the 2 blocks, got \[1\]"),
        ({"vision_units": (5, 5, 0, 5)}, "vision_units needs a number of at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            TinyOptions.from_mapping(options)

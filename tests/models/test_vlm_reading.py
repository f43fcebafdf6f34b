"""What is read inside a model that writes: levels in the order of the picture, attention maps, visual tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from vlm_support import MAKERS, asked, chat, make_vlm

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatInput, join_items
from cmapkd.methods import METHODS
from cmapkd.models import FrozenTeacher, Seen, TokenNeeds
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.token_types import Rows

OUT = ("out_proj", "proj", "projection_layer")  # where an attention's output leaves it
EVERYWHERE = frozenset({"answer", "visual", "prompt"})


@pytest.fixture(scope="module", params=MAKERS)
def model(request: pytest.FixtureRequest) -> HfVlm:
    return make_vlm(request.param)


def shown(model: HfVlm, pixels: np.ndarray) -> ChatInput:
    item = model.processor.read(asked("What?", "yes"), [Image.fromarray(pixels)])
    return join_items([item], model.processor.pad_id)


def patchwise(model: HfVlm) -> HfVlm:
    """Its first vision block no longer mixes patches, so that a changed patch changes one row."""
    block = model._vision_blocks[0]
    outs = [layer for name, layer in block.named_modules() if name.rpartition(".")[2] in OUT and "mlp" not in name]
    assert len(outs) == 1
    for parameter in outs[0].parameters():
        torch.nn.init.zeros_(parameter)
    return model


def changed_rows(model: HfVlm, before: np.ndarray, after: np.ndarray) -> list[int]:
    needs = TokenNeeds(levels=("blocks.0",))
    first, second = (model(shown(model, each), needs).levels["blocks.0"]["visual"] for each in (before, after))
    assert first.place.tolist() == list(range(len(first.place)))
    moved = (first.values - second.values).abs().amax(-1) > 1e-3
    return [int(row) for row in moved.nonzero()]


@pytest.mark.parametrize("kind", MAKERS)
def test_patches_stand_row_by_row(kind: str) -> None:
    model = patchwise(make_vlm(kind))
    height, width = (64, 96) if "qwen" in kind else (64, 64)
    before = np.random.default_rng(0).integers(60, 120, (height, width, 3), dtype=np.uint8)
    for row, column in ((0, 0), (0, 3), (1, 0), (1, 2), (3, 1), (2, width // 16 - 1)):
        after = before.copy()
        after[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)] += 100
        assert changed_rows(model, before, after) == [row * (width // 16) + column]


def test_tiles_stand_one_after_the_other_and_the_whole_picture_last() -> None:
    model = patchwise(make_vlm("idefics3"))
    pixels = model.processor.native.image_processor
    pixels.do_image_splitting, pixels.size = True, type(pixels.size)(longest_edge=128)
    before = np.random.default_rng(0).integers(60, 120, (128, 128, 3), dtype=np.uint8)
    for tile, (top, left) in enumerate(((0, 0), (0, 64), (64, 0), (64, 64))):
        after = before.copy()
        after[top + 16 : top + 32, left + 32 : left + 48] += 100  # row 1, column 2 of its tile
        rows = changed_rows(model, before, after)
        assert rows[0] == tile * 16 + 4 + 2
        assert rows[1:]
        assert min(rows[1:]) >= 4 * 16  # and where it shows in the whole picture


def test_levels_are_the_librarys_hidden_states(model: HfVlm) -> None:
    batch = chat(model)
    names = [f"{kind}.{number}" for kind in ("blocks", "layers") for number in (0, 1)]
    found = model(batch, TokenNeeds(EVERYWHERE, tuple(names)))
    states = model.model.model(**model.arguments(batch), use_cache=False, output_hidden_states=True).hidden_states
    for number in (0, 1):
        rows = found.levels[f"layers.{number}"]["answer"]
        torch.testing.assert_close(rows.values, states[number + 1][rows.sample, rows.place])
    if model.layout.packed:
        return  # this library's towers return no hidden states; their order is tested above
    pixels = batch.pictures["pixel_values"]
    tower = model._vision(pixels, output_hidden_states=True, return_dict=True)
    for number in (0, 1):
        rows = found.levels[f"blocks.{number}"]["visual"]
        expected = tower.hidden_states[number + 1][:, -16:].flatten(0, 1)
        torch.testing.assert_close(rows.values, expected)


def test_attention_maps_are_those_of_eager_and_logits_those_of_sdpa(model: HfVlm) -> None:
    batch = chat(model)
    plain = model(batch)
    before = model._language.config._attn_implementation
    found = model(batch, TokenNeeds(attention=(1,)))
    assert model._language.config._attn_implementation == before == "sdpa"
    assert torch.equal(found.hidden["answer"].values, plain.hidden["answer"].values)
    assert found.attention.keys() == {1}
    model.model.set_attn_implementation("eager")
    try:
        maps = model.model.model(**model.arguments(batch), use_cache=False, output_attentions=True).attentions
    finally:
        model.model.set_attn_implementation("sdpa")
    real = batch.texts.mask[:, None, :, None].expand_as(maps[1])
    torch.testing.assert_close(found.attention[1][real], maps[1][real], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.attention[1].sum(-1), torch.ones_like(found.attention[1].sum(-1)))
    model.zero_grad()
    found.attention[1].square().sum().backward()
    learned = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert {"vision", "projector", "language"} <= {part for part, names in model.parts.items() if names & learned}
    with pytest.raises(ValueError, match="has layers 0 to 1"):
        model(batch, TokenNeeds(attention=(2,)))


def test_a_model_with_other_attention_has_no_maps() -> None:
    model = make_vlm("llava")
    model._language.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="not 'flash_attention_2'"):
        model(chat(model), TokenNeeds(attention=(0,)))


def test_fed_with_its_own_visual_tokens_a_model_is_itself(model: HfVlm) -> None:
    batch = chat(model)
    needs = TokenNeeds(EVERYWHERE, ("projector", "layers.0"), projected=True)
    whole, seen = model(batch, needs), model.see(batch)
    fed = model.forward_seeing(batch, seen, needs)
    for where, rows in whole.hidden.items():
        torch.testing.assert_close(fed.hidden[where].values, rows.values)
    assert whole.projected is not None
    torch.testing.assert_close(seen.tokens.values, whole.projected.values)
    assert seen.tokens.place.tolist() == whole.projected.place.tolist()
    assert seen.tokens.sample.tolist() == whole.projected.sample.tolist()
    text = chat(model, [2])
    torch.testing.assert_close(
        model.forward_seeing(text, model.see(text)).hidden["answer"].values, model(text).hidden["answer"].values
    )
    with pytest.raises(ValueError, match="sees nothing here"):
        model.forward_seeing(batch, seen, TokenNeeds(levels=("blocks.0",)))
    short = Seen(Rows(seen.tokens.values[1:], seen.tokens.sample[1:], seen.tokens.place[1:]), seen.deeper)
    with pytest.raises(ValueError, match="visual tokens have shape"):
        model.forward_seeing(batch, short)


def test_gradient_reaches_a_vision_tower_through_a_frozen_language_model() -> None:
    student, teacher = make_vlm("llava"), make_vlm("llava").requires_grad_(False)
    batch = chat(student)
    found = teacher.forward_seeing(batch, student.see(batch))
    F.cross_entropy(teacher.logits(found.hidden["answer"].values), found.targets).backward()
    learned = {name for name, each in student.named_parameters() if each.grad is not None and each.grad.any()}
    assert learned & student.parts["vision"]
    assert learned & student.parts["projector"]
    assert not learned & student.parts["language"]


def test_a_model_with_deeper_visual_outputs_refuses_tokens_without_them() -> None:
    model = make_vlm("qwen3_vl")
    batch = chat(model)
    seen = model.see(batch)
    assert len(seen.deeper) == 2
    with pytest.raises(ValueError, match="adds 2 further outputs"):
        model.forward_seeing(batch, Seen(seen.tokens))


def test_a_projector_that_is_given_its_own_tower_s_tokens_is_itself(model: HfVlm) -> None:
    batch = chat(model)
    encoded, shape = model(batch, TokenNeeds(encoded=True)).encoded, model.encoded_shape
    if model.layout.packed:
        assert shape is None
        with pytest.raises(ValueError, match="cannot be given what another vision tower made"):
            model.project(batch, encoded)
        return
    assert shape is not None
    assert encoded.shape[1:] == (shape.tokens, shape.width)
    found, seen = model.project(batch, encoded).tokens, model.see(batch).tokens
    torch.testing.assert_close(found.values, seen.values)
    assert found.sample.tolist() == seen.sample.tolist()
    with pytest.raises(ValueError, match="places of visual tokens got"):
        model.project(batch, encoded[:1])
    assert model(chat(model, [2]), TokenNeeds(encoded=True)).encoded is None  # without a picture


def test_a_visual_switch_that_a_family_cannot_have_is_refused() -> None:
    for kind, settings, message in (
        ("qwen2_vl", {}, "patches of all pictures in one row.* set method.switch=projector"),
        ("qwen3_vl", {"switch": "projector"}, "feeds further outputs of its vision tower"),
    ):
        config = METHODS["switch_kd"].Config.from_mapping({"name": "switch_kd", **settings})
        with pytest.raises(ConfigError, match=message):
            METHODS["switch_kd"](config, student=make_vlm(kind), teacher=FrozenTeacher(make_vlm(kind)))

"""A teacher under autocast whose weights are held in bf16: the same bits in half the memory, of every model family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_support import FAMILIES, make, method_for
from torch import Tensor, nn

from cmapkd.cache.identity import weight_hash
from cmapkd.data.types import ModelInput
from cmapkd.models import DualEncoder, FrozenTeacher, LevelRequest, TowerFeatures
from cmapkd.models.tiny import TinyDualEncoder
from helpers import make_model, make_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHERS = [name for name in FAMILIES if name != "joined"]  # a joined model is no teacher
TEXTS = ("a red square", "two blue circles and one small green triangle", "a", "small")
ATTENTION = ("transformer.resblocks.0.attn.in_proj_bias", "transformer.resblocks.0.mlp.c_fc.weight")
# vectors whose type torch looks at; a matrix whose type open_clip gives to the embeddings of tokens; what a fused
# kernel of CPUs takes together or not at all; and what is sliced or put together before it is cast
LEFT = {
    "open_clip": {*ATTENTION, "visual.transformer.resblocks.0.attn.in_proj_bias"},
    "open_clip RN50-like": {*ATTENTION, *(f"visual.attnpool.{name}_proj.bias" for name in "qkv")},
    "timm": {f"text.{each}" for each in ATTENTION},
    "timm, SigLIP": {f"text.{each}" for each in (*ATTENTION, "transformer.resblocks.0.attn.in_proj_weight")},
    "hf SigLIP": {"vision_model.head.attention.in_proj_weight", "vision_model.head.attention.in_proj_bias"},
}
UNWATCHED = ("attnpool.positional_embedding", "head.attention.in_proj_weight", "head.probe")
"""Reshaped before they are cast: they could be held, but it is not seen."""
MORE = {  # cast too, although of no layer
    "open_clip": {"model.text_projection", "model.visual.proj", "model.visual.positional_embedding"},
    "open_clip RN50-like": {"model.text_projection"},
    "timm": {"model.text.text_projection"},
    "parts": {"text_head.queries"},
}


def inputs(model: DualEncoder, seed: int = 5) -> ModelInput:
    side = model.image_spec.size
    pixels = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ModelInput(pixels, model.tokenizer(TEXTS), {"synthetic": model.tokenizer(TEXTS[::-1])})


@torch.no_grad()
def answers(model: DualEncoder, batch: ModelInput) -> dict[str, Tensor]:
    """As a step in bf16 has them: with all levels, with none, and in a micro-batch."""
    every = LevelRequest(*(tuple(info.name for info in infos) for infos in (model.image_levels, model.text_levels)))
    found: dict[str, Tensor] = {}
    with torch.autocast("cpu", torch.bfloat16):
        for how, part, needs in (("all", batch, every), ("none", batch, None), ("part", batch.part(1, 3), every)):
            features = model(part, needs)
            towers = {"image": features.image, "text": features.text, **features.more_texts}
            for name, tower in towers.items():
                found[f"{how}/{name}"] = tower.embedding
                found |= {f"{how}/{name}/{key}": level.values for key, level in tower.levels.items()}
            found[f"{how}/scale"] = features.logit_scale
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key, value in one.items() if value.dtype != other[key].dtype or not torch.equal(value, other[key])]


def num_bytes(model: nn.Module, names: set[str] | frozenset[str] | None = None) -> int:
    of = dict(model.named_parameters())
    return sum(each.untyped_storage().nbytes() for name, each in of.items() if names is None or name in names)


def of_layers(model: nn.Module) -> set[str]:
    """Weights and biases of everything that multiplies matrices or convolves."""
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for key, _ in module.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("name", TEACHERS)
def test_every_familys_answers_bit_for_bit(name: str, tmp_path: Path) -> None:
    teacher = FrozenTeacher(make(name, tmp_path))
    model, batch = teacher.model, inputs(teacher.model)
    before = {key: each.clone() for key, each in model.named_parameters()}
    expected, size = answers(model, batch), num_bytes(model)
    draws = torch.get_rng_state()
    teacher.hold_in_bf16()
    assert torch.equal(torch.get_rng_state(), draws)
    assert differing(answers(model, batch), expected) == []
    left = {f"model.{each}" for each in LEFT.get(name, ())}
    layers = of_layers(model) | MORE.get(name, set())
    assert model.held == layers - left
    for key, each in model.named_parameters():
        assert each.dtype == (torch.bfloat16 if key in model.held else torch.float32), key
        assert torch.equal(each, before[key].to(each.dtype)), key
    held = 4 * sum(before[key].numel() for key in model.held)
    assert num_bytes(model, model.held) == held / 2
    assert num_bytes(model) == size - held / 2


@pytest.mark.parametrize("name", TEACHERS)
def test_rounding_another_matrix_would_show(name: str, tmp_path: Path) -> None:
    """So what is left in fp32 is left for a reason, and the comparison above sees a weight that is rounded wrongly."""
    model = FrozenTeacher(make(name, tmp_path)).model
    batch = inputs(model)
    expected = answers(model, batch)
    FrozenTeacher(model).hold_in_bf16()
    layers = of_layers(model)
    others = {key: each for key, each in model.named_parameters() if each.ndim > 1 and key not in model.held}
    assert len(others) > 2
    for key, each in others.items():
        kept = each.data
        each.data = kept.to(torch.bfloat16) if key in layers else kept.to(torch.bfloat16).float()
        if key.endswith(UNWATCHED):
            assert not differing(answers(model, batch), expected)
        else:
            assert differing(answers(model, batch), expected), key
        each.data = kept
    assert differing(answers(model, batch), expected) == []


class Planted(TinyDualEncoder):
    """Text embeddings come out of one more matrix, which is used in a way of its own."""

    use: Callable[[Tensor, Tensor], Tensor]

    def encode_text(self, texts: Any, levels: Any = ()) -> TowerFeatures:
        tower = super().encode_text(texts, levels)
        return TowerFeatures(type(self).use(tower.embedding, self.more), tower.levels)


USES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {  # and whether the matrix can be held
    "product": (lambda x, w: x @ w, True),
    "twice": (lambda x, w: (x @ w) @ w, True),
    "sum": (lambda x, w: x @ w + w[0], False),
    "norm": (lambda x, w: x @ w / w.norm(), False),
    "product in fp32": (lambda x, w: x.float().mul(2.0).unsqueeze(1).mul(w).sum(2), False),
    "type as told": (lambda x, w: (x @ w).to(w.dtype) + 0.1, False),
    "type looked at for nothing": (lambda x, w: (x @ w) if w.dtype else x, True),
    "at random": (lambda x, w: x @ w + torch.randn(()), False),
}


def planted(use: Callable[[Tensor, Tensor], Tensor]) -> TinyDualEncoder:
    model = make_model(kind=type("Used", (Planted,), {"use": staticmethod(use)}))
    model.more = nn.Parameter(torch.randn(16, 16))
    return model


@pytest.mark.parametrize("kind", USES)
def test_how_a_weight_is_used_decides(kind: str) -> None:
    use, can = USES[kind]
    model = planted(use)
    FrozenTeacher(model).hold_in_bf16()
    assert ("more" in model.held) == can
    assert (model.more.dtype is torch.bfloat16) == can
    if kind == "at random":  # nothing can be proved of it
        assert not model.held
    else:
        assert "vision.blocks.0.qkv.weight" in model.held


def test_a_group_that_fails_is_tried_weight_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a type is looked at in a way that nobody sees."""
    import cmapkd.models.held_weights as held_weights

    model = planted(lambda x, w: (x @ w).to(w.dtype) + 0.1)
    expected = answers(model, inputs(model))
    monkeypatch.setattr(held_weights._TypesRead, "__torch_function__", lambda _s, f, _t, a=(), k=None: f(*a, **k or {}))
    FrozenTeacher(model).hold_in_bf16()
    assert "more" not in model.held
    assert "vision.blocks.0.qkv.weight" in model.held
    assert differing(answers(model, inputs(model)), expected) == []


def test_a_held_model_is_neither_saved_nor_hashed(tmp_path: Path) -> None:
    teacher = make_teacher()
    known = weight_hash(teacher.model)
    teacher.hold_in_bf16()
    held = teacher.model.held
    assert held
    teacher.hold_in_bf16()  # a second time changes nothing
    assert teacher.model.held == held
    for refused in (lambda: weight_hash(teacher.model), lambda: teacher.model.save(tmp_path / "saved")):
        with pytest.raises(ValueError, match=r"weights of test-24 are held in bf16.*load the model again"):
            refused()
    assert weight_hash(make_teacher().model) == known


@pytest.mark.parametrize("name", ["promptkd", "hinton"])
def test_weights_that_a_student_reads_too_stay_as_they_are(name: str) -> None:
    """Its text tower is the teacher's, and is evaluated and saved in fp32."""
    settings = {"form": "classes", "class_vectors": "teacher"} if name == "hinton" else {}
    method = method_for(make_model(), name, **settings)
    teacher = method.teacher
    assert isinstance(teacher, FrozenTeacher)
    assert teacher.shared
    teacher.hold_in_bf16()
    assert not teacher.model.held
    assert {each.dtype for each in teacher.model.parameters()} == {torch.float32}


def test_a_copy_that_was_made_before_keeps_its_weights() -> None:
    """As c2kd makes one of its teacher's text tower, which learns."""
    teacher = make_teacher()
    tower = copy.deepcopy(teacher.model)
    known = weight_hash(tower)
    teacher.hold_in_bf16()
    assert weight_hash(tower) == known

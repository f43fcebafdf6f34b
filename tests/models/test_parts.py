"""What every model family says of its parameters: their part, whether they are decayed, and the small common base."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import save_word_tokenizer
from test_hf_family import write as write_hf
from test_open_clip_family import CONFIGS, small, write

from cmapkd.models import DualEncoder, Model, ModelConfig, build_model, load_model
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.masked import MaskedEncoder
from cmapkd.models.parts import DUAL_PARTS
from cmapkd.models.prompts import make_prompts
from cmapkd.models.reach import example_output, parameters_behind
from helpers import make_model, make_teacher

TIMM = {"embed_dim": 24, "text_width": 32, "text_layers": 2, "text_heads": 2, "context_length": 16}


def transformers_text(folder: Path) -> DualEncoder:
    from transformers import RobertaConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaConfig(vocab_size=20, max_position_embeddings=40, pad_token_id=0, **sizes).save_pretrained(folder / "text")
    save_word_tokenizer(folder / "words")
    text = {
        "hf_model_name": str(folder / "text"),
        "hf_tokenizer_name": str(folder / "words"),
        "hf_proj_type": "mlp",
        "context_length": 24,
    }
    return build_model(f"open_clip:{write(folder, {**CONFIGS['vit'], 'text_cfg': text})}")


def hf(kind: str, folder: Path) -> DualEncoder:
    write_hf(kind, folder)
    return build_model(f"hf:{folder}")


def timm(name: str, _folder: Path, **options: Any) -> DualEncoder:
    return build_model(ModelConfig(name=f"timm:{name}", options={**TIMM, **options}))


def joined(folder: Path, *, owned: bool) -> DualEncoder:
    student = make_model(dim=8)
    model = JoinedEncoder(
        student, make_teacher(), projector="two_layer", prompts=make_prompts(student, depth=1, count=2)
    )
    if not owned:
        return model
    model.save(folder / "joined")
    return load_model(folder / "joined")


FAMILIES = {
    **{f"open_clip {kind}": partial(small, kind) for kind in CONFIGS},
    "open_clip with a transformers text tower": transformers_text,
    "hf clip": partial(hf, "clip"),
    "hf siglip": partial(hf, "siglip"),
    "timm vit": partial(timm, "test_vit"),
    "timm with registers": partial(timm, "vit_small_patch14_reg4_dinov2", image_size=28, embed_dim=16),
    "timm with its own classifier": partial(timm, "mobilenetv3_small_050", image_size=32),
    "timm convolutional": partial(timm, "test_resnet"),
    "timm with windows": partial(timm, "swinv2_cr_tiny_ns_224", image_size=64),
    "tiny": lambda _folder: make_model(),
    "joined": partial(joined, owned=False),
    "joined, loaded": partial(joined, owned=True),
    "masked": lambda _folder: MaskedEncoder(make_model()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_one_part_and_what_says_where_tokens_stand_is_not_decayed(
    family: str, tmp_path: Path
) -> None:
    model = FAMILIES[family](tmp_path)
    assert isinstance(model, Model)
    parameters = dict(model.named_parameters())
    listed = [name for names in model.parts.values() for name in names]
    assert sorted(listed) == sorted(parameters)
    extra = {"joined": {"prompts"}, "masked": {"masks"}}.get(family.split(",")[0], set())
    assert set(model.parts) == {*DUAL_PARTS, *extra}

    image = parameters_behind(model, partial(example_output, model, "image"))
    text = frozenset[str]()  # of a frozen teacher's text tower, no parameter is the model's
    if family != "joined":
        text = parameters_behind(model, partial(example_output, model, "text"))
    own_text = {name for name in model.parts["text"] if not name.startswith(("image.text.", "text.vision."))}
    assert not model.parts["image"] & text
    assert not own_text & image
    assert image - model.parts["image"] <= model.parts["projections"] | model.parts.get("prompts", set())
    assert text <= model.parts["text"] | model.parts["projections"]
    scale = {name for name, parameter in parameters.items() if parameter is model.log_logit_scale}
    assert scale <= model.parts["scale"]
    assert all("logit" in name for name in model.parts["scale"])

    spared = model.no_weight_decay()
    assert spared <= parameters.keys()
    assert model.parts["scale"] <= spared
    words = ("pos", "class_", "cls_", "reg_token", "prompts.", "logit_")
    wanted = {n for n, p in parameters.items() if any(w in n for w in words) and p.ndim >= 2 and "head_dist" not in n}
    decayed = {
        n for n in wanted - spared if not n.endswith((".fc1.weight", ".fc2.weight", "norm.weight", "class_proj"))
    }
    assert not decayed
    matrices = {n for n, p in parameters.items() if p.ndim >= 2}
    assert matrices - spared, "weights are decayed"
    assert not any("token_embedding" in name or "word" in name or "qkv" in name for name in spared)


def test_registers_and_prompts_are_not_decayed(tmp_path: Path) -> None:
    model = FAMILIES["timm with registers"](tmp_path)
    spared = model.no_weight_decay()
    assert {f"model.visual.trunk.{name}" for name in ("pos_embed", "cls_token", "reg_token")} <= spared
    assert "model.text.positional_embedding" in spared
    assert "prompts.tokens" in joined(tmp_path, owned=False).no_weight_decay()
    assert "text.tokens.weight" not in make_model().no_weight_decay()


def test_the_projections_are_what_leads_to_the_joint_space(tmp_path: Path) -> None:
    assert FAMILIES["hf siglip"](tmp_path / "a").parts["projections"] == {
        "model.text_model.head.weight",
        "model.text_model.head.bias",
    }
    assert small("resnet", tmp_path).parts["projections"] == {
        "model.text_projection",
        "model.visual.attnpool.c_proj.weight",
        "model.visual.attnpool.c_proj.bias",
    }
    own = FAMILIES["timm with its own classifier"](tmp_path).parts["projections"]
    assert {name for name in own if "trunk" in name} == {
        "model.visual.trunk.classifier.weight",
        "model.visual.trunk.classifier.bias",
    }
    assert make_model().parts["projections"] == {"vision.project.weight", "text.project.weight"}


def test_after_step_keeps_the_scale_in_range_and_measurements_say_it(tmp_path: Path) -> None:
    masked = MaskedEncoder(make_model())
    for model in (make_model(), masked, joined(tmp_path, owned=False), small("vit", tmp_path)):
        with torch.no_grad():
            model.log_logit_scale.fill_(9.0)
        model.after_step()
        assert model.log_logit_scale.item() == pytest.approx(math.log(100))
        measured = model.measurements()["logit_scale"]
        assert measured.item() == pytest.approx(100.0)
        assert (measured.shape, measured.requires_grad) == ((), False)
        assert model.device == torch.device("cpu")
    siglip = small("siglip", tmp_path)
    with torch.no_grad():
        siglip.log_logit_scale.fill_(5.0)
    siglip.after_step()
    assert siglip.log_logit_scale.item() == 5.0


def test_a_teacher_is_in_no_state_of_a_student_that_is_joined_to_it() -> None:
    student, teacher = make_model(dim=8), make_teacher()
    model = JoinedEncoder(student, teacher, projector="linear")
    of_teacher = {value.untyped_storage().data_ptr() for value in teacher.model.state_dict().values()}
    state = model.state_dict()
    assert not {name for name, value in state.items() if value.untyped_storage().data_ptr() in of_teacher}
    assert {name.split(".")[0] for name in state} == {"image", "project"}
    assert len(state) == len(student.state_dict()) + 2


def test_what_a_subclass_adds_is_a_part_of_its_own() -> None:
    model = make_model()
    model.extra = torch.nn.Linear(2, 2)
    assert model.parts["added"] == {"extra.weight", "extra.bias"}

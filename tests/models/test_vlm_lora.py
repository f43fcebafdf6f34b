"""Adapters of models that write: what learns, what is saved, and the files that peft reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from vlm_support import MAKERS, TEXTS, chat, make_vlm

from cmapkd.config import ConfigError
from cmapkd.models import Decoding, ModelConfig, build_model, load_model
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.lora import LoraConfig, LoraLinear, adapters_of
from writers import assert_same, make_run, make_task, make_writer, results

WEIGHTS = "adapter_model.safetensors"


def adapted(kind: str = "llava", *, moved: bool = True, **settings: Any) -> HfVlm:
    """A model with adapters, whose B is not zero where they are `moved`."""
    model = make_vlm(kind)
    model.adapt(LoraConfig.from_mapping(settings))
    if moved:
        move(model)
    return model


def adapted_writer() -> Any:
    student = make_writer()
    torch.manual_seed(5)
    student.adapt(LoraConfig(rank=2))
    return student


def move(model: HfVlm) -> None:
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapters_of(model).values():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=draws))


def answers(model: HfVlm) -> torch.Tensor:
    return model(chat(model)).hidden["answer"].values


def test_the_adapter_is_its_formula() -> None:
    layer = LoraLinear(torch.nn.Linear(6, 4).double(), rank=2, alpha=3.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    torch.nn.init.normal_(layer.lora_B)
    expected = x @ layer.weight.T + layer.bias + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merged()(x), expected)


@pytest.mark.parametrize("kind", MAKERS)
def test_adapters_begin_as_nothing_and_learn_alone(kind: str) -> None:
    model = adapted(kind, moved=False, rank=3)
    assert torch.equal(answers(model), answers(make_vlm(kind)))
    assert len(adapters_of(model)) == 4  # two layers, two targets, none of the vision tower
    found = model(chat(model))
    F.cross_entropy(model.logits(found.hidden["answer"].values), found.targets).backward()
    learned = {name for name, each in model.named_parameters() if each.grad is not None}
    assert learned == model.parts["adapters"]
    moved = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert moved == {name for name in learned if name.endswith("lora_B")}  # A is behind a zero
    assert frozenset().union(*model.parts.values()) == {name for name, _ in model.named_parameters()}


def test_targets_are_named_or_all() -> None:
    everything = adapted(targets="all")
    assert {name.rpartition(".")[2] for name in adapters_of(everything)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    with pytest.raises(ConfigError, match=r"lora.targets has 'qproj' \(did you mean 'q_proj'"):
        adapted(targets=["qproj"])
    beside = adapted(learn=["projector"])
    learning = {name for name, each in beside.named_parameters() if each.requires_grad}
    assert learning == beside.parts["projector"] | beside.parts["adapters"]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_saved_student_is_an_ordinary_model(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, targets="all")
    expected, state = answers(model), {name: value.clone() for name, value in model.state_dict().items()}
    model.save(tmp_path)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    again = load_model(tmp_path)
    assert isinstance(again, HfVlm)
    assert not adapters_of(again)
    largest = max(1.0, float(expected.detach().abs().max()))  # sums round in its proportion; Gemma's states are large
    torch.testing.assert_close(answers(again), expected, atol=2e-6 * largest, rtol=1e-5)
    how = Decoding(max_new_tokens=3)
    assert again.generate(chat(again), how) == model.generate(chat(model), how)
    model.merge_adapters()
    assert not model.parts["adapters"]
    assert torch.equal(answers(model), answers(again))


def test_adapters_are_files_of_peft(tmp_path: Path) -> None:
    """Names, shapes and settings as peft's page on its checkpoint format has them."""
    model = adapted(rank=3, alpha=6)
    model.save(tmp_path)
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["bias"], config["use_dora"]) == (3, 6.0, "none", False)
    tensors = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    layer = "base_model.model.model.language_model.layers.1.self_attn.v_proj"
    assert tensors[f"{layer}.lora_A.weight"].shape == (3, 64)
    assert tensors[f"{layer}.lora_B.weight"].shape == (32, 3)
    assert len(tensors) == 8
    paths = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    matched = [path for path in paths if re.fullmatch(config["target_modules"], path)]  # as peft reads a text
    assert matched == list(adapters_of(model.model))
    again = adapted(moved=False, folder=tmp_path / "adapters")
    assert torch.equal(answers(again), answers(model))


def test_published_adapters_with_other_names_are_read(tmp_path: Path) -> None:
    model = adapted(rank=4, alpha=8)
    model.save(tmp_path)
    folder = tmp_path / "adapters"
    tensors = load_file(folder / "adapter_model.safetensors")
    old = {name.replace("model.model.language_model", "model.language_model.model"): tensors[name] for name in tensors}
    save_file(old, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True, "lora_alpha": 4}))
    again = adapted(moved=False, folder=folder)  # 4 / sqrt(4) is 8 / 4
    torch.testing.assert_close(answers(again), answers(model))
    for change, reason in (
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "plain LoRA"),
        ({"r": 5}, "says r = 5"),
        ({"r": 9_999_999}, "says r = 9999999"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=reason):
            adapted(folder=folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name.replace("language_model", "vision_tower"): each for name, each in old.items()}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="the language model has no such layer"):
        adapted(folder=folder)
    with pytest.raises(ValueError, match="leave out rank"):
        LoraConfig(folder=folder, rank=4)


def test_a_recipe_names_adapters(tmp_path: Path) -> None:
    make_vlm("llava").save(tmp_path)
    lora = {"rank": 2, "alpha": 4, "targets": ["q_proj"]}
    model = build_model(ModelConfig(name=f"hf:{tmp_path}", options={"lora": lora}))
    assert isinstance(model, HfVlm)
    assert [layer.rank for layer in adapters_of(model).values()] == [2, 2]
    assert torch.equal(answers(model), answers(make_vlm("llava")))
    tiny = build_model(ModelConfig(name="tiny_vlm:small", options={"lora": lora}), captions=TEXTS * 3)
    assert len(adapters_of(tiny)) == 3
    base = build_model(ModelConfig(name="tiny_vlm:small"), captions=TEXTS * 3)
    save_file({name: value.clone() for name, value in base.state_dict().items()}, tmp_path / "base.safetensors")
    tiny.load_checkpoint(tmp_path / "base.safetensors")  # what they are to be learned on
    assert torch.equal(answers(tiny), answers(base))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sft", "token_kd"])
def test_micro_batches_are_the_whole(name: str) -> None:
    found = []
    for micro_batch in (None, 2):
        student = adapted_writer()
        move(student)
        found.append(results(make_task(name, student=student), micro_batch=micro_batch))
    assert {key for key in found[0] if key.startswith("gradient/")} == {
        f"gradient/student.{each}" for each in student.parts["adapters"]
    }
    assert_same(found[1], found[0])


class _PowerCut(Exception):
    pass


def test_training_moves_adapters_alone_with_an_average_and_an_exact_resume(tmp_path: Path) -> None:
    def trainer(out: str) -> Any:
        task = make_task("sft", student=adapted_writer().float())
        return make_run(tmp_path / out, task, steps=4, ema=0.5, micro_batch=3, checkpoint_every=2)

    whole, cut, again = trainer("whole"), trainer("cut"), trainer("cut")
    before = {name: value.clone() for name, value in whole.method.student.state_dict().items()}
    averaged = whole.run().student
    after = whole.method.student.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == whole.method.student.parts["adapters"]
    take = cut._step

    def until(batch: Any) -> Any:
        if cut.progress.step == 3:
            raise _PowerCut
        return take(batch)

    cut._step = until
    with pytest.raises(_PowerCut):
        cut.run()
    torch.manual_seed(99)
    resumed = again.run(resume=True).student
    assert all(torch.equal(value, averaged.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert all(torch.equal(value, after[name]) for name, value in again.method.student.state_dict().items())
    averaged.save(tmp_path / "saved")
    assert not adapters_of(load_model(tmp_path / "saved"))


def test_a_part_without_weights_of_its_own_cannot_learn() -> None:
    """A tied head belongs to the embeddings, so a setting that names it would do nothing."""
    with pytest.raises(ConfigError, match=r"lora\.learn names head, which has no weights of its own here"):
        adapted(learn=["head"])

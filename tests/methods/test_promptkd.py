"""PromptKD against the published loss and projector; what is frozen, what is saved, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cmapkd
from cmapkd.data.open import open_source
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.run import evaluate
from cmapkd.methods.promptkd import PromptKD
from cmapkd.models import load_model
from cmapkd.models.heads import make_projector
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.texts import class_vectors
from cmapkd.models.tiny import TinyDualEncoder
from cmapkd.objectives import kl_divergence
from cmapkd.training import Interrupted, Trainer
from cmapkd.training.checkpoint import list_checkpoints, read_checkpoint
from helpers import CLASSES, make_method, make_model, make_trainer, random_batch

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "promptkd.json").read_text())


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", PUBLISHED["loss"])
def test_loss_equals_the_published_line(case: dict[str, Any]) -> None:
    student = tensor(case["student_logits"]).requires_grad_()
    divergence = kl_divergence(student, tensor(case["teacher_logits"]), temperature=case["temperature"])
    value = case["weight"] * divergence / student.shape[1]
    assert value.item() == pytest.approx(case["value"], rel=1e-10)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], tensor(case["gradient"]), rtol=1e-9, atol=1e-11)


def test_projector_equals_the_published_class() -> None:
    case = PUBLISHED["projector"]
    project = make_projector("two_layer", 4, 6).double()
    weights = {key.removeprefix("conv1."): tensor(values) for key, values in case["weights"].items()}
    statistics = {key: weights.pop(key) for key in ("1.running_mean", "1.running_var")}
    shaped = {key: value.flatten(1) if value.ndim == 4 else value for key, value in weights.items()}  # 1x1 convolutions
    project.load_state_dict(shaped, strict=False)
    x = tensor(case["input"]).requires_grad_()
    found = project(x)
    torch.testing.assert_close(found, tensor(case["output"]))
    ramp = torch.arange(30.0, dtype=torch.float64).view(5, 6)
    torch.testing.assert_close(torch.autograd.grad((found * ramp).sum(), x)[0], tensor(case["gradient"]))
    for key, value in statistics.items():
        torch.testing.assert_close(project.state_dict()[key], value)
    torch.testing.assert_close(project.eval()(x), tensor(case["output_eval"]))


def made() -> PromptKD:
    method = make_method("promptkd", settings={"distill_weight": 200.0, "temperature": 2.0, "prompts": 3})
    assert isinstance(method, PromptKD)
    return method.train()


def test_term_is_the_formula() -> None:
    method = made()
    batch = random_batch(6)
    assert method.teacher is not None
    teacher = method.teacher.model
    vectors = class_vectors(teacher, CLASSES.names, CLASSES.templates, device="cpu")
    (term,) = method.terms(batch).values()
    student = method.student.encode_image(batch.inputs["student"].images).embedding  # a batch norm in train mode too
    ours = method.student.log_logit_scale.exp() * F.normalize(student, dim=-1) @ vectors.T
    images = F.normalize(teacher.encode_image(batch.inputs["teacher"].images).embedding, dim=-1)
    theirs = teacher.log_logit_scale.exp() * images @ vectors.T
    log_q, p = F.log_softmax(ours / 2, 1), F.softmax(theirs / 2, 1)
    expected = F.kl_div(log_q, p, reduction="sum") * 4 / ours.numel()
    assert term.weight == 200
    torch.testing.assert_close(term.value, expected, rtol=1e-4, atol=1e-6)


def test_only_prompts_and_projector_learn_and_the_rest_keeps_every_bit(tmp_path: Path) -> None:
    method = made()
    with torch.no_grad():
        method.student.log_logit_scale.fill_(5.0)  # beyond what CLIP would clamp
    before = {key: value.clone() for key, value in method.state_dict().items()}
    learning = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in learning} == {"prompts", "project"}
    make_trainer(tmp_path, method, steps=3).run()
    assert not method.prompted.image.training
    for key, value in method.state_dict().items():
        changed = not torch.equal(value, before[key])
        frozen = key.startswith("student.image.") or key == "class_vectors"
        assert changed != frozen, key


def test_without_prompts_the_projector_learns_alone() -> None:
    method = make_method("promptkd", settings={"prompts": 0})
    learning = {name.split(".")[1] for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert learning == {"project"}
    method(random_batch(4))["classes"].value.backward()


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "recipe": "promptkd_scenes",
        "data": {"train": "scenes:hard?length=40", "val": "scenes:easy@val?length=30", "test": None},
        "training": {"steps": 4, "batch_size": 8, "checkpoint_every": 1, "log_every": 1},
        "quiet": True,
    } | changes


def test_a_resumed_run_ends_the_same_and_its_folder_scores_what_the_run_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"cache": {"mode": "auto", "folder": str(tmp_path / "cache")}}
    whole = cmapkd.distill(**settings(tmp_path, **cache), out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_agreed", lambda self, _stop: self.progress.step == 2)
        with pytest.raises(Interrupted):
            cmapkd.distill(**settings(tmp_path, **cache), out=tmp_path / "parts")
    cmapkd.distill(**settings(tmp_path, **cache), out=tmp_path / "parts", resume=True)
    ends = [read_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1])[0] for name in ("whole", "parts")]
    for group in ("method", "optimizer"):
        assert ends[0][group].keys() == ends[1][group].keys()
        assert all(torch.equal(ends[0][group][key], ends[1][group][key]) for key in ends[0][group])
    assert not any(key.startswith("student.text.") for key in ends[0]["method"])
    student = load_model(tmp_path / "whole")
    assert isinstance(student, JoinedEncoder)
    scores = evaluate(
        student, open_source("scenes:easy@val?length=30"), EvaluationConfig(tasks=("zero_shot",)), device="cpu"
    )
    assert scores["zero_shot"] == whole.metrics["student"]["zero_shot"]


def test_towers_without_tokens_are_refused() -> None:
    class Convolutional(TinyDualEncoder):
        image_blocks = ()

    with pytest.raises(ValueError, match="takes no prompts"):
        make_method("promptkd", student=make_model(kind=Convolutional))

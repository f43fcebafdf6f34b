"""VL2V-ADiP against the published loss and head; what learns in each stage, and what labels count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.config import ConfigError
from cmapkd.methods import LABELS
from cmapkd.methods.vl2v_adip import VL2VADiP, VL2VADiPConfig
from cmapkd.models import Features, TowerFeatures
from cmapkd.objectives import labelled_distance, similarities
from helpers import make_method, make_teacher, make_trainer, random_batch

CASES = json.loads((Path(__file__).parent / "fixtures" / "vl2v_adip.json").read_text())["cases"]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def vl2v(**settings: Any) -> VL2VADiP:
    method = make_method("vl2v_adip", settings=settings)
    assert isinstance(method, VL2VADiP)
    return method


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_published_one_plus_one(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = tensor(case["embedding"]).requires_grad_()
    method, nothing = vl2v(image_share=case["share"]), torch.ones(())
    method.class_vectors = tensor(case["vectors"])
    features = [
        Features(TowerFeatures(each), TowerFeatures(each[:, :0]), nothing)
        for each in (embedding, tensor(case["image"]))
    ]
    monkeypatch.setattr(method, "encode_student", lambda _: features[0])
    monkeypatch.setattr(method, "encode_teacher", lambda _: features[1])
    monkeypatch.setattr(method, "labels", lambda _: torch.tensor(case["labels"]))
    terms = method.terms(random_batch(4))
    value = torch.stack([term.weight * term.value for term in terms.values()]).sum()
    assert value.item() == pytest.approx(case["value"] + 1, rel=1e-10)
    (gradient,) = torch.autograd.grad(value, embedding)
    torch.testing.assert_close(gradient, tensor(case["gradient"]), rtol=1e-9, atol=1e-11)
    logits = similarities(embedding, method.class_vectors, case["scale"])
    torch.testing.assert_close(logits, tensor(case["logits"]))


def test_distances_of_labelled_samples_are_the_loop() -> None:
    ours, theirs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([2, -1, 0, -1])
    expected = sum(float(2 - 2 * torch.cosine_similarity(ours[row], theirs[row], dim=0)) for row in (0, 2)) / 2
    assert float(labelled_distance(ours, theirs, labels)) == pytest.approx(expected, rel=1e-12)
    assert gradcheck(lambda x: labelled_distance(x, theirs, labels), ours.requires_grad_())
    value = labelled_distance(ours, theirs, torch.full((4,), -1))
    assert value.item() == 0
    assert not torch.autograd.grad(value, ours)[0].any()


def test_stages_train_the_projector_and_then_the_tower(tmp_path: Path) -> None:
    method = vl2v()
    parts = method.student_parts
    assert parts["projector"] == {"project.weight", "project.bias"}
    assert not parts["tower"] & (parts["projector"] | parts["scale"] | parts["text"])
    before = {name: parameter.detach().clone() for name, parameter in method.student.named_parameters()}
    changed: dict[str, set[str]] = {}
    for stage in method.default_stages:
        make_trainer(tmp_path / stage.name, method, steps=2, stages=[stage.model_copy(update={"share": 1.0})]).run()
        now = dict(method.student.named_parameters())
        changed[stage.name] = {name for name in before if not torch.equal(before[name], now[name])}
        before = {name: parameter.detach().clone() for name, parameter in now.items()}
        method.let_all_learn()
    assert changed["align"] == parts["projector"]
    assert changed["distil"]
    assert changed["distil"] <= parts["tower"]


def test_shares_and_labels() -> None:
    batch = random_batch(5)
    assert vl2v(image_share=1).term_names == ("image",)
    alone = vl2v(image_share=0)
    alone.teachers.clear()
    assert list(alone(batch)) == ["text"]  # nobody asks the teacher
    unlabelled = replace(batch, extra={LABELS: torch.full((5,), -1)})
    terms = vl2v()(unlabelled)
    assert terms["text"].value.item() == 0
    assert terms["image"].value.item() > 0
    with pytest.raises(ConfigError, match="both zero, which leaves nothing to learn"):
        VL2VADiPConfig.from_mapping({"name": "vl2v_adip", "image_share": 0, "label_share": 0})


def test_the_student_predicts_with_the_teachers_scale_and_has_a_projector_of_any_width() -> None:
    method = make_method("vl2v_adip", teacher=make_teacher(dim=16))
    assert method.teacher is not None
    assert torch.equal(method.student.log_logit_scale, method.teacher.model.log_logit_scale)
    image = method.student.encode_image(random_batch(3).inputs["student"].images).embedding
    assert F.normalize(image, dim=1).shape == (3, 16)
    assert "project.weight" in dict(method.student.named_parameters())

"""VL2Lite against the published criterion and networks; how its weights move, and a short run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from cmapkd.methods import StepInfo
from cmapkd.methods.vl2lite import VL2Lite, aligner
from cmapkd.models import Features, TowerFeatures
from cmapkd.objectives import absolute_distance
from helpers import make_method, make_trainer, random_batch, read_lines

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "vl2lite.json").read_text())


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def vl2lite(**settings: Any) -> VL2Lite:
    method = make_method("vl2lite", settings=settings)
    assert isinstance(method, VL2Lite)
    return method


@pytest.mark.parametrize("case", PUBLISHED["cases"])
def test_terms_are_the_published_loss(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    method = vl2lite().double()
    features, classes, answers = (
        tensor(each) for each in (case["learned"]["features"], case["classes"], case["teacher_image"])
    )
    features.requires_grad_()
    method.class_vectors = classes
    head = nn.Linear(features.shape[1], len(classes)).double()
    method.student.heads["labels"] = head
    learned = {"features": features, "head.weight": head.weight, "head.bias": head.bias}
    for ours, theirs in (("align_image", "align_img_layer"), ("align_text", "align_nlp_layer")):
        network = aligner(classes.shape[1], features.shape[1]).double()
        setattr(method, ours, network)
        learned |= {f"align.{theirs}.{name}": parameter for name, parameter in network.named_parameters()}
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(tensor(case["learned"][name]))
    scale = torch.ones((), dtype=torch.float64)
    monkeypatch.setattr(method, "features", lambda _batch: features)
    monkeypatch.setattr(method, "labels", lambda _batch: torch.tensor(case["labels"]))
    found = Features(TowerFeatures(answers), TowerFeatures(answers[:, :0]), scale)
    monkeypatch.setattr(method, "encode_teacher", lambda _batch: found)
    method.step = StepInfo(step=round(12 * case["progress"]), total=12)
    terms = method.terms(random_batch(2))
    assert terms["labels"].weight == pytest.approx(case["weight"])
    assert terms["labels"].value.item() == pytest.approx(case["ce"], rel=1e-9)
    assert terms["vision"].value.item() == pytest.approx(case["image"], rel=1e-8)
    assert terms["language"].value.item() / 2 == pytest.approx(case["language"], rel=1e-8)
    loss = sum(term.weight * term.value for term in terms.values())
    assert loss.item() == pytest.approx(case["loss"], rel=1e-8)
    gradients = torch.autograd.grad(loss, [*learned.values()])
    for name, mine in zip(learned, gradients, strict=True):
        torch.testing.assert_close(mine, tensor(case["gradients"][name]), rtol=1e-7, atol=1e-9, msg=name)


def test_the_distance_is_the_mean_written_out() -> None:
    torch.manual_seed(0)
    one, two = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    u, v = (each / each.norm(dim=1, keepdim=True) for each in (one, two))
    expected = sum(abs(float(u[i, c] - v[i, c])) for i in range(3) for c in range(4)) / 12
    assert float(absolute_distance(one, two)) == pytest.approx(expected)
    assert float(absolute_distance(one, 3 * one)) == pytest.approx(0.0, abs=1e-12)
    assert gradcheck(absolute_distance, (one.requires_grad_(), two.requires_grad_()))
    with pytest.raises(ValueError, match="width"):
        absolute_distance(one, two[:, :3])


def test_terms_of_a_batch_written_out() -> None:
    method, batch = vl2lite(ramp=False, task_weight=0.4), random_batch(6)
    terms, f = method(batch), method.features(batch)
    v, w = F.normalize(method.encode_teacher(batch).image.embedding, dim=-1), method.class_vectors
    h, g, class_texts = (F.normalize(each, dim=-1) for each in (f, method.align_image(v), method.align_text(w)))
    torch.testing.assert_close(terms["vision"].value, (h - g).abs().mean())
    p, q = ((x @ y.T / 0.07 / 2).softmax(-1) for x, y in ((v, w), (h, class_texts)))
    torch.testing.assert_close(terms["language"].value, 4 * (p * (p / q).log()).sum(1).mean())
    assert {name: term.weight for name, term in terms.items()} == pytest.approx(
        {"labels": 0.4, "vision": 0.3, "language": 0.15}
    )


def test_the_weight_of_labels_grows_and_networks_are_dropped(tmp_path: Path) -> None:
    trained = make_trainer(tmp_path, "vl2lite", steps=4)
    student = trained.run().student
    assert not any("align" in name for name in student.state_dict())
    assert len(read_lines(tmp_path / "metrics.jsonl")) >= 4
    weights = [vl2lite().weights_at(progress)["labels"] for progress in (0.0, 0.5, 1.0)]
    assert weights == [0.0, 0.0625, 0.125]
    assert vl2lite(vision_weight=0).term_names == ("labels", "language")


def test_terms_that_count_nothing_at_the_end_are_terms() -> None:
    method = vl2lite(task_weight=1.0, term_weighting="uniform")
    assert method.term_names == ("labels", "vision", "language")
    terms = method(random_batch(6), StepInfo(step=1, total=4))
    assert terms["weighted"].value > 0
    assert method.needs_labels
    assert not vl2lite(task_weight=0.0).needs_labels

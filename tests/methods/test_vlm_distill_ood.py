"""vlm_distill_ood: every term against the published lines and against loops; labels, filters, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.methods import LABELS, build_method
from cmapkd.methods.vlm_distill_ood import VlmDistillOod, VlmDistillOodConfig
from cmapkd.models import Features, TowerFeatures, load_model
from cmapkd.models.joined import JoinedEncoder
from cmapkd.objectives import agreeing, nearest_divergence, own_text_cross_entropy
from helpers import make_method, make_model, make_teacher, random_batch

# Numbers of the authors' loss lines; the file names commit and conditions.
CASES = json.loads((Path(__file__).parent / "fixtures" / "vlm_distill_ood.json").read_text())["cases"]
OFF = dict.fromkeys(("label_weight", "feature_weight", "contrastive_weight", "proximal_weight"), 0)
TERMS: dict[str, tuple[dict[str, Any], ...]] = {  # published: our settings, of which each gives a part of the loss
    "labels": ({**OFF, "label_weight": 1},),
    "proximal": ({**OFF, "proximal_weight": 1},),
    "proximal, all": ({**OFF, "proximal_weight": 1, "keep_wrong": True},),
    "feature": ({**OFF, "feature_weight": 1},),
    "feature, log": ({**OFF, "feature_weight": 1, "feature": "log"},),
    "contrastive": ({**OFF, "contrastive_weight": 1},),
    "labels and captions": ({**OFF, "label_weight": 1, "caption_weight": 1, "caption_temperature": "official"},),
    "all": ({"caption_weight": 1, "caption_temperature": "official"},),
}


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ood(**settings: Any) -> VlmDistillOod:
    method = make_method("vlm_distill_ood", settings=settings)
    assert isinstance(method, VlmDistillOod)
    return method


@pytest.mark.parametrize("case", CASES, ids=["fewer classes", "all classes", "another temperature"])
@pytest.mark.parametrize("name", TERMS)
def test_terms_equal_the_published_lines(case: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tensor(case["outputs"]).requires_grad_()
    nothing = torch.ones(())
    student = Features(TowerFeatures(own), TowerFeatures(own[:, :0]), nothing)
    answers = TowerFeatures(tensor(case["teacher"])), TowerFeatures(tensor(case["captions"]))
    total = torch.zeros((), dtype=torch.float64)
    for settings in TERMS[name]:
        method = ood(temperature=case["temperature"], top_k=case["top_k"], **settings)
        method.class_vectors = tensor(case["texts"])
        monkeypatch.setattr(method, "encode_student", lambda _: student)
        monkeypatch.setattr(method, "encode_teacher", lambda _: Features(*answers, nothing))
        monkeypatch.setattr(method, "labels", lambda _: torch.tensor(case["labels"]))
        terms = method.terms(random_batch(4))
        assert tuple(terms) == method.term_names
        total = total + torch.stack([term.weight * term.value for term in terms.values()]).sum()
    expected = case["expected"][name]
    assert total.item() == pytest.approx(expected["value"], rel=1e-10)
    (gradient,) = torch.autograd.grad(total, own)
    torch.testing.assert_close(gradient, tensor(expected["gradient"]), rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------------ objectives


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_nearest_classes_are_a_loop() -> None:
    ours, theirs = draws(4, 6), draws(4, 6, seed=1)
    counts = torch.tensor([True, False, True, True])
    expected = 0.0
    for row in (0, 2, 3):
        nearest = sorted(range(6), key=lambda place: -theirs[row, place].item())[:3]
        p, q = (torch.stack([each[row, place] for place in nearest]).exp() for each in (theirs, ours))
        p, q = p / p.sum(), q / q.sum()
        expected += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)) / 3
    assert float(nearest_divergence(ours, theirs, number=3, counts=counts)) == pytest.approx(expected, rel=1e-12)
    assert gradcheck(lambda x: nearest_divergence(x, theirs, number=3, counts=counts), ours.requires_grad_())
    with pytest.raises(ValueError, match="among 1 classes"):
        nearest_divergence(ours, theirs, number=1)
    with pytest.raises(ValueError, match="class by class"):
        nearest_divergence(ours, theirs[:, 1:], number=2)


def test_a_filter_that_keeps_nothing_gives_zero_and_no_gradient() -> None:
    ours = draws(3, 4).requires_grad_()
    value = nearest_divergence(ours, draws(3, 4, seed=1), number=4, counts=torch.zeros(3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value, ours)
    assert value.item() == 0
    assert not gradient.any()


def test_who_agrees() -> None:
    logits = torch.tensor([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0]])
    assert agreeing(logits, torch.tensor([1, 1, -1])).tolist() == [True, False, True]


def test_own_texts_among_those_of_other_classes() -> None:
    logits, labels = draws(4, 4), torch.tensor([0, 0, -1, -1])
    rivals = {0: (0, 2, 3), 1: (1, 2, 3), 2: (0, 1, 2, 3), 3: (0, 1, 2, 3)}  # unlabelled ones are of no class
    expected = sum(
        -float(logits[row, row] - torch.stack([logits[row, each] for each in among]).logsumexp(0))
        for row, among in rivals.items()
    )
    assert float(own_text_cross_entropy(logits, labels)) == pytest.approx(expected / 4, rel=1e-12)
    assert gradcheck(lambda x: own_text_cross_entropy(x, labels), logits.requires_grad_())
    with pytest.raises(ValueError, match="one text and one label for each picture"):
        own_text_cross_entropy(logits, labels[:3])


# ------------------------------------------------------------------------------------------------ the method


def test_what_learns_and_at_which_scale() -> None:
    method, batch = ood(temperature=0.1, caption_weight=1), random_batch(6)
    assert isinstance(method.student, JoinedEncoder)
    assert float(method.student.log_logit_scale) == pytest.approx(math.log(10))
    torch.stack([term.value for term in method(batch).values()]).sum().backward()
    learned = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[1] for name in learned} == {"image", "project"}
    assert not any(name.startswith("student.image.text") or "scale" in name for name in learned)
    same = make_method("vlm_distill_ood", teacher=make_teacher(dim=16))
    assert not any(name.startswith("student.project.") for name, _ in same.named_parameters())


def test_captions_alone_need_captions_and_the_teachers_text() -> None:
    assert not VlmDistillOodConfig().reads_captions
    assert ood().teacher_needs.towers == ("image",)
    assert VlmDistillOodConfig(caption_weight=1.0).reads_captions
    assert ood(caption_weight=1).teacher_needs.towers == ("image", "text")


def labelled(batch: Batch, label: int) -> Batch:
    return replace(batch, extra={LABELS: torch.full((len(batch),), label)})


def test_without_labels_the_teachers_terms_are_left() -> None:
    method, batch = ood(), labelled(random_batch(6), -1)
    terms = method(batch)
    assert terms["labels"].value.item() == 0
    everything = ood(keep_wrong=True)(batch)
    torch.testing.assert_close(terms["proximal"].value, everything["proximal"].value)
    alone = ood(**{**OFF, "label_weight": 1})
    alone.teachers.clear()
    assert list(alone(batch)) == ["labels"]  # nobody asks the teacher


@pytest.mark.parametrize(("settings", "message"), [({"top_k": 1}, "top_k"), ({"temperature": 0}, "temperature")])
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VlmDistillOodConfig.from_mapping({"name": "vlm_distill_ood", **settings})


def test_one_class_is_refused() -> None:
    config = VlmDistillOodConfig(name="vlm_distill_ood")
    with pytest.raises(ConfigError, match="tells classes apart, and the data have red cat: give data with more"):
        build_method(config, student=make_model(), teacher=make_teacher(), classes=ClassPrompts(("red cat",), ("{}",)))


def test_classes_left_out_are_no_rivals_and_their_samples_have_no_label() -> None:
    batch = replace(random_batch(4), extra={LABELS: torch.tensor([0, 1, 4, -1])})
    method, whole = ood(left_out=["green dog"]), ood()
    assert method.labels(batch).tolist() == [0, -1, 3, -1]
    torch.testing.assert_close(method.class_vectors, whole.class_vectors[[0, 2, 3, 4]])
    with pytest.raises(
        ConfigError, match=r"left_out names 'gren dog' \(did you mean 'green dog'\?\), which is no class"
    ):
        ood(left_out=["gren dog"])


def test_a_run_from_one_row_a_sample_saves_a_model_for_any_classes(tmp_path: Path) -> None:
    done = cmapkd.distill(
        recipe="vlm_distill_ood_scenes",
        student="tiny:debug",
        data={"train": "scenes?length=32&size=32", "val": "scenes@val?length=20&size=32", "test": None},
        training={"steps": 2, "batch_size": 8, "device": "cpu"},
        optim={"warmup_steps": 1},
        cache={"mode": "auto", "folder": str(tmp_path / "cache")},
        out=tmp_path / "run",
        quiet=True,
    )
    assert done.metrics["student"]["zero_shot"]["num_classes"] == 100
    assert isinstance(load_model(tmp_path / "run"), JoinedEncoder)

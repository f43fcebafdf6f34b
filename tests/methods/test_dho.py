"""DHO against the published loss and search; how its heads begin, what is refused, and a run from data to answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.templates import ClassPrompts
from cmapkd.evaluation.embed import embed
from cmapkd.evaluation.mixing import best_mix
from cmapkd.methods.dho import DHO
from cmapkd.models import Classifier, build_model, load_model
from cmapkd.models.classifier import AnswerRule, mixed
from cmapkd.models.texts import embed_texts, mean_class_texts
from cmapkd.objectives import kl_divergence, labelled_cross_entropy
from cmapkd.run import vocabulary_captions
from helpers import CLASSES, make_classifier, make_method, make_model, make_teacher, random_batch

# Numbers of the authors' code; the file names commit and conditions.
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "dho.json").read_text())


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def dho(**settings: Any) -> DHO:
    method = make_method("dho", settings=settings)
    assert isinstance(method, DHO)
    return method


@pytest.mark.parametrize("case", PUBLISHED["cases"])
def test_terms_are_the_published_loss(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many labelled as unlabelled samples, whatever the networks: features and embeddings are given."""
    method = dho().double()
    features, classes = tensor(case["features"]).requires_grad_(), tensor(case["classes"])
    method.class_vectors = classes
    learned = {"features": features}
    for name, (weight, bias) in case["heads"].items():
        head = torch.nn.Linear(1, 1)
        head.weight, head.bias = torch.nn.Parameter(tensor(weight)), torch.nn.Parameter(tensor(bias))
        method.student.heads[name] = head
        learned |= {f"{name}.weight": head.weight, f"{name}.bias": head.bias}
    hidden = [-1] * (len(features) - case["labelled"])
    monkeypatch.setattr(method, "features", lambda _batch: features)
    monkeypatch.setattr(method, "labels", lambda _batch: torch.tensor(case["labels"] + hidden))
    answers = torch.nn.functional.normalize(tensor(case["teacher_image"]), dim=-1)
    monkeypatch.setattr(method, "teacher_logits", lambda _batch: 100.0 * answers @ classes.T)
    terms = method.terms(random_batch(2))
    assert terms["labels"].value.item() == pytest.approx(case["ce"], rel=1e-10)
    assert 2 * terms["classes"].value.item() == pytest.approx(sum(case["distill"]), rel=1e-10)
    loss = sum(term.weight * term.value for term in terms.values())
    assert loss.item() == pytest.approx(case["loss"], rel=1e-10)
    found = torch.autograd.grad(loss, list(learned.values()))
    expected = [case["gradients"]["features"], *case["gradients"]["labels"], *case["gradients"]["teacher"]]
    for name, mine, theirs in zip(learned, found, expected, strict=True):
        torch.testing.assert_close(mine, tensor(theirs), rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("case", PUBLISHED["mixes"])
def test_the_best_mix_is_the_published_one(case: dict[str, Any]) -> None:
    first, second, labels = tensor(case["first"]), tensor(case["second"]), torch.tensor(case["labels"])
    for setting, accuracy in case["accuracies"].items():
        alpha, beta = map(float, setting.split(","))
        right = mixed(first, second, alpha=alpha, beta=beta).argmax(-1) == labels
        assert 100 * float(right.double().mean()) == pytest.approx(accuracy)
    assert best_mix(first, second, labels).accuracy == pytest.approx(case["best"])


def test_of_equal_mixes_the_likeliest_is_taken() -> None:
    first, second = torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    found = best_mix(first, second, torch.tensor([0, 0]))  # every mix is right
    assert (found.alpha, found.accuracy) == (1.0, 100.0)
    assert best_mix(first, second, torch.tensor([0, -1]), alphas=(0.25,), betas=(2.0,))[:2] == (0.25, 2.0)
    with pytest.raises(ValueError, match="none of the 2 images has a label"):
        best_mix(first, second, torch.tensor([-1, -1]))


def test_terms_of_a_batch_written_out() -> None:
    method, batch = dho(teacher_scale="own", temperature=3.0), random_batch(6)
    terms = method(batch)
    f, labels = method.features(batch), batch.extra["labels"]
    v = F.normalize(method.encode_teacher(batch).image.embedding, dim=-1)
    assert method.teacher is not None
    z_t = method.teacher.model.log_logit_scale.exp() * v @ method.class_vectors.T
    z_k = method.student.heads["teacher"](f)
    p, q = (z_t / 3).softmax(-1), (z_k / 3).softmax(-1)
    torch.testing.assert_close(terms["classes"].value, 9 * (p * (p / q).log()).sum(1).mean())
    known = labels >= 0
    expected = F.cross_entropy(method.student.heads["labels"](f)[known], labels[known])
    torch.testing.assert_close(terms["labels"].value, expected)
    assert (terms["labels"].weight, terms["classes"].weight) == (0.5, 1.0)


def test_one_head_learns_both_terms() -> None:
    method, batch = dho(one_head=True), random_batch(6)
    assert [*method.student.heads] == ["teacher"]
    assert method.mix is None
    logits = method.student.logits("teacher", method.features(batch))
    terms = method(batch)
    torch.testing.assert_close(terms["labels"].value, labelled_cross_entropy(logits, batch.extra["labels"]))
    torch.testing.assert_close(
        terms["classes"].value, kl_divergence(logits, method.teacher_logits(batch), temperature=2.0)
    )


def test_gradients_at_the_features_may_be_watched() -> None:
    method, batch = dho(watch_gradients=True), random_batch(6)
    method(batch)
    features, labels = method.features(batch), batch.extra["labels"]
    head, other = method.student.heads["labels"], method.student.heads["teacher"]
    known = labels >= 0
    right = F.one_hot(labels.clamp_min(0), len(CLASSES.names))
    ce = (head(features).softmax(-1) - right) @ head.weight * known[:, None]
    soft = (other(features) / 2).softmax(-1) - (method.teacher_logits(batch) / 2).softmax(-1)
    kd = soft @ other.weight * known[:, None]
    expected = F.cosine_similarity(ce.flatten(), kd.flatten(), dim=0)
    torch.testing.assert_close(method.measurements["gradient_cosine"], expected.detach())
    with torch.no_grad():
        method(batch)  # an evaluation has no gradients


@pytest.mark.parametrize(
    ("templates", "own", "tuned"),
    [
        ((), (("a red dot", "a dot"), ("a square",), ("the sea",)), None),
        (("a {}.",), (("a red dot", "a dot"), (), ("the sea",)), None),
        (("a {}.",), ((), ("a square",), ()), ("this is {}", "a {} here")),
    ],
)
@torch.no_grad()
def test_class_texts_are_means_of_all_prompts_of_a_class(
    templates: tuple[str, ...], own: tuple[tuple[str, ...], ...], tuned: tuple[str, ...] | None
) -> None:
    model, names = make_model(dim=24), ("dot", "square", "sea")
    model.class_templates = tuned
    found = mean_class_texts(model, ClassPrompts(names, templates, own), device="cpu")
    for label, name in enumerate(names):
        texts = [template.format(name) for template in tuned or templates] + ([] if tuned else [*own[label]])
        expected = torch.stack([model.encode_text(model.tokenizer([text])).embedding[0] for text in texts]).mean(0)
        torch.testing.assert_close(found[label], expected)


def test_heads_may_begin_as_texts(tmp_path: Path) -> None:
    student = make_classifier(dim=24)
    teacher = make_teacher()
    method = make_method("dho", student=student, teacher=teacher, settings={"head_texts": "teacher"})
    texts, own = CLASSES.texts, teacher.model
    with torch.no_grad():
        raw = torch.stack([own.encode_text(own.tokenizer([text])).embedding[0] for text in texts])
    expected = raw.view(5, 2, -1).mean(1)
    for head in student.heads.values():
        torch.testing.assert_close(head.weight.detach(), expected)
        assert not head.bias.detach().any()
    features = torch.randn(3, 24)
    unit = F.normalize(features, dim=-1)
    torch.testing.assert_close(student.logits("teacher", features), 100 * unit @ expected.T)
    torch.testing.assert_close(student.logits("labels", features), features @ expected.T)
    assert embed_texts(own, texts[:1], batch_size=1, device="cpu").norm() == pytest.approx(1.0)
    folder = tmp_path / "texts"
    make_model(dim=24, seed=3).save(folder)
    make_method("dho", student=make_classifier(dim=24), settings={"head_texts": str(folder)})
    assert method.term_names == ("labels", "classes")
    with pytest.raises(ConfigError, match=r"embeds in 24 numbers, and the tower of classifier:tiny:test in 16"):
        dho(head_texts="teacher")


def test_wrong_settings_and_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="teacher_scale is -1: give a number > 0, or own"):
        dho(teacher_scale=-1.0)
    with pytest.raises(ConfigError, match=r"needs a student that classifies pictures.*classifier:test-16, see"):
        make_method("dho", student=make_model())
    with pytest.raises(ConfigError, match=r"needs a student that embeds pictures and texts.*supervised, dho"):
        make_method("hinton", student=make_classifier())


def test_a_run_chooses_the_mix_on_validation_data_alone(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "training": {"steps": 4, "batch_size": 8, "evaluate_every": 2, "student": "best"},
        "optim": {"warmup_steps": 1},
    }
    make_world_teacher(tmp_path / "teacher")
    data = {
        "train": "scenes:easy?length=60&size=32&shots=1",
        "more": {"unlabelled": {"source": "scenes:easy?length=60&size=32&labels=hidden", "share": 0.5}},
        "val": "scenes:easy@val?length=12&size=32",
        "test": "scenes:easy@test?length=10&size=32",
    }
    cmapkd.distill(
        teacher=str(tmp_path / "teacher"), student="classifier:tiny:debug", method="dho", data=data,
        out=tmp_path / "run", quiet=True, **settings,
    )  # fmt: skip
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    student = load_model(tmp_path / "run")
    assert isinstance(student, Classifier)
    assert student.rule is not None
    assert metrics["student"]["accuracy"]["rule"] == student.rule.model_dump(mode="json")
    assert student.rule.heads == ("labels", "teacher")
    assert metrics["teacher"]["accuracy"]["num_images"] == 10
    assert set(metrics["student"]["accuracy"]["heads"]) == {"labels", "teacher"}
    seen = embed(student, open_source(data["val"]), batch_size=16, device="cpu")  # type: ignore[arg-type]
    found = best_mix(*(seen.logits[head] for head in student.rule.heads), seen.labels)
    assert (student.rule.alpha, student.rule.beta) == (found.alpha, found.beta)


def test_a_mix_may_be_stated() -> None:
    method = dho(alpha=0.25)
    assert method.mix == (0.25, None)
    assert method.student.rule == AnswerRule(heads=("labels", "teacher"), alpha=0.25, beta=1.0)


def make_world_teacher(folder: Path) -> None:
    torch.manual_seed(0)
    captions = vocabulary_captions(open_source("scenes:easy?length=40", split="train"))
    model = build_model("tiny:debug", captions=captions)
    model.random_towers = ()  # type: ignore[attr-defined]
    model.save(folder)

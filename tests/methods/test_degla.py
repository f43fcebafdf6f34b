"""DeGLA: its terms against the published loss class, NegCLIP as a form of it, its teacher and its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.methods import StepInfo
from cmapkd.methods.degla import PUBLISHED_DISTILL_WEIGHT, Degla
from cmapkd.models import Features, TowerFeatures
from helpers import make_method, make_model, random_batch

# Numbers of `CLIPloss_DeGLA` and of NegCLIP's `ClipLoss`; the file names commits and conditions.
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "degla.json").read_text())
CASES = PUBLISHED["cases"]
TERMS = ("contrastive", "image_grounded", "text_grounded", "feature")
NEG_CLIP = {"negatives": 1, "image_grounded_weight": 0, "text_grounded_weight": 0, "distill_weight": 0}
LEARNED = ("image", "text", "negatives", "scale")


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def degla(**settings: Any) -> Degla:
    method = make_method("degla", settings=settings)
    assert isinstance(method, Degla)
    return method.train()


def batch_for(method: Degla, size: int = 4) -> Batch:
    return random_batch(size, pools=method.text_pools)


def features(case: dict[str, Any], of: str, scale: Tensor) -> Features:
    image, text, negatives = (case[f"{of}{name}"] for name in ("image", "text", "negatives"))
    return Features(
        TowerFeatures(image), TowerFeatures(text), logit_scale=scale, more_texts={"negatives": TowerFeatures(negatives)}
    )


def given(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Degla, dict[str, Tensor]]:
    """A method that sees the numbers of a case, and what can learn of them."""
    held = {name: tensor(value) for name, value in case.items() if isinstance(value, list)}
    held["scale"] = tensor(case["scale"])
    learned = {name: held[name].requires_grad_() for name in LEARNED}
    settings = {"text_grounded_with": "official", "negatives": case.get("per_sample", 1), **settings}
    method = make_method("degla", student=make_model(dim=held["image"].shape[1]), settings=settings).train()
    assert isinstance(method, Degla)
    monkeypatch.setattr(method, "encode_student", lambda _: features(held, "", held["scale"]))
    if method.momentum is not None:
        monkeypatch.setattr(method, "encode_teacher", lambda _: features(held, "teacher_", tensor(1.0)))
    return method, learned


def assert_gradients(value: Tensor, learned: dict[str, Tensor], expected: dict[str, Any], factor: float = 1.0) -> None:
    found = torch.autograd.grad(value, list(learned.values()), allow_unused=True)
    assert {name for name, each in zip(learned, found, strict=True) if each is not None} == expected.keys()
    for name, gradient in zip(learned, found, strict=True):
        if gradient is not None:
            torch.testing.assert_close(gradient, factor * tensor(expected[name]), rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("case", CASES, ids=["6 pairs, 4 false texts", "3 pairs, 2 false texts"])
def test_terms_equal_the_published_code(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The published distance is a sum over pairs; so the whole loss has 0.005 × pairs in the place of 1.28."""
    pairs = len(case["image"])
    for name in TERMS:
        method, learned = given(case, monkeypatch)
        value, published = method.terms(batch_for(method))[name].value, case["expected"][name]
        factor = 1 / pairs if name == "feature" else 1.0
        assert value.item() == pytest.approx(factor * published["value"], rel=1e-9)
        assert_gradients(value, learned, published["gradients"], factor)
    method, _ = given(case, monkeypatch, distill_weight=0.005 * pairs)
    total = sum(term.weight * term.value.item() for term in method.terms(batch_for(method)).values())
    assert total == pytest.approx(case["expected"]["total"]["value"], rel=1e-9)
    assert pytest.approx(0.005 * 256) == PUBLISHED_DISTILL_WEIGHT


def test_neg_clip_is_its_first_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings of docs/methods.md, values and gradients are those of NegCLIP's published loss."""
    case = PUBLISHED["neg_clip"]["case"]
    method, learned = given(case, monkeypatch, **NEG_CLIP)
    terms = method.terms(batch_for(method))
    assert terms.keys() == {"contrastive"}
    assert method.momentum is None
    assert not method.teachers
    assert terms["contrastive"].weight == 1.0
    assert terms["contrastive"].value.item() == pytest.approx(case["value"], rel=1e-9)
    assert_gradients(terms["contrastive"].value, learned, case["gradients"])
    docs = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    settings = ", ".join(f"{name}: {value}" for name, value in NEG_CLIP.items())
    assert f"method: {{name: degla, {settings}}}" in docs


def test_texts_are_grounded_in_their_own_false_texts_unless_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out in loops; published are the places i + kB of the list that is sorted by sample."""
    case = CASES[0]
    pairs, each = len(case["image"]), case["per_sample"]
    t, n, t_m = (
        torch.nn.functional.normalize(tensor(case[key]), dim=-1) for key in ("text", "negatives", "teacher_text")
    )
    for form in ("own", "official"):
        expected = 0.0
        for i in range(pairs):
            places = [i * each + k if form == "own" else i + k * pairs for k in range(each)]
            own = torch.exp(10 * t[i] @ t_m[i])
            expected -= float(torch.log(own / (own + torch.exp(10 * n[places] @ t[i]).sum()))) / pairs
        method, _ = given(case, monkeypatch, text_grounded_with=form)
        assert method.terms(batch_for(method))["text_grounded"].value.item() == pytest.approx(expected, rel=1e-9)


def test_default_terms_and_weights() -> None:
    method = degla()
    terms = method.terms(batch_for(method))
    weights = {name: term.weight for name, term in terms.items()}
    assert weights == {"contrastive": 1.0, "image_grounded": 0.1, "text_grounded": 0.1, "feature": 1.28}
    assert tuple(terms) == method.term_names == TERMS
    assert all(term.value.shape == () for term in terms.values())


@pytest.mark.parametrize("name", TERMS)
def test_a_weight_of_zero_switches_a_term_off_and_changes_no_other(name: str) -> None:
    weight = {"contrastive": "task_weight", "feature": "distill_weight"}.get(name, f"{name}_weight")
    full, less = degla(), degla(**{weight: 0})
    everything, rest = full.terms(batch_for(full)), less.terms(batch_for(less))
    assert rest.keys() == everything.keys() - {name} == set(less.term_names)
    for other in rest:
        torch.testing.assert_close(rest[other].value, everything[other].value)


def test_a_student_that_is_its_teacher_has_no_distance_and_a_momentum_of_one_keeps_it() -> None:
    method = degla(momentum=1.0)
    assert method.momentum is not None
    method.momentum.model.load_state_dict(method.student.state_dict())
    batch = batch_for(method)
    assert method.terms(batch)["feature"].value.item() == pytest.approx(0, abs=1e-6)
    before = {name: value.clone() for name, value in method.momentum.model.state_dict().items()}
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(0.1)
    method.after_step(StepInfo())
    for name, value in method.momentum.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert method.terms(batch)["feature"].value.item() > 0.01


def test_only_the_student_learns() -> None:
    method = degla()
    torch.stack([term.value for term in method.terms(batch_for(method)).values()]).sum().backward()
    learns = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, _ in method.named_parameters() if name.startswith("student.")}


def test_captions_of_one_picture_are_no_negatives_but_false_texts_are() -> None:
    method = degla(several_positives=True, **NEG_CLIP)
    batch = batch_for(method)
    batch.extra["pictures"] = torch.zeros(4, dtype=torch.int64)
    student = method.encode_student(batch)
    own = torch.nn.functional.cosine_similarity(student.image.embedding, student.text.embedding)
    image = torch.nn.functional.normalize(student.image.embedding, dim=-1)
    false = torch.nn.functional.normalize(student.more_texts["negatives"].embedding, dim=-1)
    logits = student.logit_scale * torch.cat([own[:, None], image @ false.T], 1)
    expected = (logits.logsumexp(1) - logits[:, 0]).mean() / 2  # of texts nothing is left
    torch.testing.assert_close(method.terms(batch)["contrastive"].value, expected)


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (({"negatives": 0}, r"negatives: .*>= 1"), ({"momentum": 1.5}, r"momentum: .*<= 1")):
        with pytest.raises((ConfigError, ValueError), match=message):
            degla(**settings)

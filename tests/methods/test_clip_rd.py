"""CLIP-RD: its terms against the published loss class, and how the method is put together."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmapkd.methods import StepInfo
from cmapkd.methods.clip_rd import ClipRD, ClipRDConfig
from cmapkd.methods.in_batch import PUBLISHED_FEATURE_WEIGHT
from cmapkd.models import Features, TowerFeatures
from cmapkd.objectives import contrastive_loss, feature_distance
from helpers import LENT, make_method, make_model, make_teacher, random_batch

# Numbers of `KDClipLoss` of the authors' repository; the file names commit and conditions.
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "clip_rd.json").read_text())
CASES = PUBLISHED["cases"]
TERMS = ("contrastive", "feature", "interactive", "hrd", "vrd", "vrd_contrastive", "xrd")
SCALES = ("image_scale", "text_scale", "cross_scale")


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def clip_rd(**settings: Any) -> ClipRD:
    """Between models of one width if `dim` is among the settings."""
    teacher = make_teacher(dim=settings.pop("dim")) if "dim" in settings else None
    method = make_method("clip_rd", teacher=teacher, settings=settings)
    assert isinstance(method, ClipRD)
    return method


class Published:
    """A case of the fixture: a method that holds its numbers, and everything that can learn."""

    def __init__(self, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        images, texts = tensor(case["student_image"]), tensor(case["student_text"])
        answers = tensor(case["teacher_image"]), tensor(case["teacher_text"])
        student, teacher = make_model(dim=images.shape[1]), make_teacher(dim=answers[0].shape[1])
        settings = {"scale": "official", "task_space": "official", **settings}
        self.method = make_method("clip_rd", student=student, teacher=teacher, settings=settings).double()
        state = {f"project.{key}": tensor(value) for key, value in case.get("projection", {}).items()}
        state |= {name: tensor(case[name]) for name in SCALES}
        missing, unexpected = self.method.load_state_dict(state, strict=False)
        assert not unexpected
        assert all(name.startswith("student.") for name in missing)
        scale = tensor(case["student_scale"])
        self.learned = {"student_image": images, "student_text": texts, "student_scale": scale}
        for each in self.learned.values():
            each.requires_grad_()
        self.learned |= {
            name.replace("project.", "projection."): parameter
            for name, parameter in self.method.named_parameters()
            if not name.startswith("student.")
        }
        of_student = Features(TowerFeatures(images), TowerFeatures(texts), logit_scale=scale)
        of_teacher = Features(*map(TowerFeatures, answers), logit_scale=tensor(case["teacher_scale"]))
        monkeypatch.setattr(self.method, "encode_student", lambda _: of_student)
        monkeypatch.setattr(self.method, "encode_teacher", lambda _: of_teacher)

    def value(self, name: str) -> Tensor:
        return self.method.terms(random_batch(4))[name].value

    def gradients(self, value: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(value, list(self.learned.values()), allow_unused=True)
        return {name: gradient for name, gradient in zip(self.learned, found, strict=True) if gradient is not None}


def expected_of(case: dict[str, Any], name: str) -> tuple[float, dict[str, Tensor]]:
    """Value and gradients; published are the two halves of `vrd_contrastive`, and `feature` as a mean over channels."""
    halves = [f"{name}_image", f"{name}_text"] if name == "vrd_contrastive" else [name]
    factor = len(case["teacher_image"][0]) if name == "feature" else 1
    value, gradients = 0.0, defaultdict(lambda: torch.zeros(()))
    for part in (case["expected"][half] for half in halves):
        value += factor * part["value"]
        for key, gradient in part["gradients"].items():
            gradients[key] = gradients[key] + factor * tensor(gradient)
    return value, gradients


@pytest.mark.parametrize("case", CASES, ids=["equal widths", "different widths"])
@pytest.mark.parametrize("name", TERMS)
def test_term_equals_the_published_code(case: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(case, monkeypatch)
    value = published.value(name)
    expected, gradients = expected_of(case, name)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    found = published.gradients(value)
    assert found.keys() == gradients.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[key], rtol=1e-9, atol=1e-10, msg=key)


@pytest.mark.parametrize("case", CASES, ids=["equal widths", "different widths"])
def test_the_whole_loss_is_the_published_sum(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights of the published script, FD's restated for the width."""
    width = len(case["teacher_image"][0])
    published = Published(case, monkeypatch, feature_weight=2000 / width)
    terms = published.method.terms(random_batch(4))
    expected = sum((2000 if name == "feature" else 1) * part["value"] for name, part in case["expected"].items())
    total = sum(term.weight * term.value.item() for term in terms.values())
    assert total == pytest.approx(expected, rel=1e-9)


# ------------------------------------------------------------------------------------------------ formulas


def kl(target: Tensor, follower: Tensor) -> Tensor:
    """KL of the softmaxes over rows, batch mean."""
    p, q = target.softmax(-1), follower.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def matching(logits: Tensor) -> Tensor:
    """CE of each row against its own column, batch mean."""
    return -logits.softmax(-1).diagonal().log().mean()


def test_every_term_is_its_formula_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With different widths, the student's own space for the task, and exponentiated scales."""
    method = Published(CASES[1], monkeypatch, scale="exp", task_space="own").method
    terms = method.terms(random_batch(4))
    case, maps = CASES[1], {key: tensor(value) for key, value in CASES[1]["projection"].items()}
    raw = {side: tensor(case[f"student_{side}"]) for side in ("image", "text")}
    v, t = (unit(raw[side] @ maps[f"{side}.weight"].T + maps[f"{side}.bias"]) for side in raw)
    own_v, own_t = unit(raw["image"]), unit(raw["text"])
    v_T, t_T = unit(tensor(case["teacher_image"])), unit(tensor(case["teacher_text"]))
    a, b, c = (math.exp(case[name]) for name in SCALES)
    s_S, s_T = case["student_scale"], case["teacher_scale"]
    own, theirs = s_S * own_v @ own_t.T, s_T * v_T @ t_T.T
    x, y = c * v_T @ t.T, c * t_T @ v.T
    image, text = a * v @ v_T.T, b * t @ t_T.T
    expected = {
        "contrastive": (matching(own) + matching(own.T)) / 2,
        "feature": ((v - v_T) ** 2).sum(-1).mean() + ((t - t_T) ** 2).sum(-1).mean(),
        "interactive": (matching(c * v @ t_T.T) + matching(c * t @ v_T.T)) / 2,
        "hrd": (kl(theirs, own) + kl(theirs.T, own.T)) / 2,
        "vrd": (kl(text.T, image.T) + kl(text, image)) / 2,
        "vrd_contrastive": (matching(image) + matching(image.T) + matching(text) + matching(text.T)) / 2,
        "xrd": (kl(x, y) + kl(y, x) + kl(x.T, y.T) + kl(y.T, x.T)) / 4,
    }
    assert terms.keys() == expected.keys() == set(TERMS)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].value, value, msg=name)


def test_published_feature_weight_is_restated_for_the_sum() -> None:
    student, teacher = torch.randn(2, 3, 512, dtype=torch.float64)
    published = 2000 * nn.functional.mse_loss(unit(student), unit(teacher))
    torch.testing.assert_close(PUBLISHED_FEATURE_WEIGHT * feature_distance(student, teacher), published)


def test_task_space_matters_where_widths_differ_and_only_there() -> None:
    for dim, same in ((24, False), (16, True)):
        own, official = (clip_rd(dim=dim, task_space=space).terms(random_batch(4)) for space in ("own", "official"))
        for name in TERMS:
            equal = torch.equal(own[name].value, official[name].value)
            assert equal == (same or name not in ("contrastive", "hrd")), (dim, name)


def test_a_student_that_is_the_teacher_still_has_vertical_and_cross_losses() -> None:
    """It has no distance and no horizontal divergence; its modalities' relations are not alike."""
    model = make_model(dim=24, image_size=24)
    method = make_method("clip_rd", student=model, teacher=make_teacher(dim=24, seed=0))
    batch = random_batch(4)
    batch.inputs["student"] = batch.inputs["teacher"]
    terms = method.terms(batch)
    for name in ("feature", "hrd"):
        assert terms[name].value.item() == pytest.approx(0, abs=1e-6)
    assert terms["xrd"].value.item() > 1e-4
    assert terms["vrd"].value.item() > 1e-4


# ------------------------------------------------------------------------------------------------ weights and parts


def test_default_terms_and_weights() -> None:
    terms = clip_rd().terms(random_batch(4))
    assert {name: term.weight for name, term in terms.items()} == dict.fromkeys(TERMS, 1.0) | {
        "feature": PUBLISHED_FEATURE_WEIGHT
    }
    assert tuple(terms) == clip_rd().term_names
    assert all(term.value.shape == () and term.value.dtype == torch.float32 for term in terms.values())


WEIGHTS = {f"{'task' if name == 'contrastive' else name}_weight": name for name in TERMS}


@pytest.mark.parametrize(("weight", "term"), WEIGHTS.items())
def test_a_weight_of_zero_switches_a_term_off_and_changes_no_other(weight: str, term: str) -> None:
    full, less = clip_rd(), clip_rd(**{weight: 0})
    state = full.state_dict()
    less.load_state_dict({name: state[name] for name in less.state_dict()})
    everything, rest = full.terms(random_batch(4)), less.terms(random_batch(4))
    assert rest.keys() == everything.keys() - {term} == set(less.term_names)
    for name in rest:
        torch.testing.assert_close(rest[name].value, everything[name].value)


def test_weights_belong_to_their_terms_and_not_to_values() -> None:
    given = {weight: number + 2.0 for number, weight in enumerate(WEIGHTS)}
    weighted, plain = clip_rd(**given).terms(random_batch(4)), clip_rd().terms(random_batch(4))
    assert {weight: weighted[term].weight for weight, term in WEIGHTS.items()} == given
    for name in TERMS:
        torch.testing.assert_close(weighted[name].value, plain[name].value)


def own_parameters(**settings: Any) -> set[str]:
    return {name for name, _ in clip_rd(**settings).named_parameters() if not name.startswith("student.")}


def test_maps_and_scales_stand_only_where_a_term_reads_them() -> None:
    maps = {f"project.{side}.{part}" for side in ("image", "text") for part in ("weight", "bias")}
    none = dict.fromkeys(set(WEIGHTS) - {"task_weight"}, 0)
    assert own_parameters() == {*maps, *SCALES}
    assert own_parameters(dim=16) == set(SCALES)
    assert own_parameters(**none) == set()
    assert own_parameters(**none, task_space="official") == maps
    assert own_parameters(**{**none, "hrd_weight": 1}) == set()
    assert own_parameters(**{**none, "feature_weight": 1}) == maps
    for weight in ("interactive_weight", "xrd_weight"):
        assert own_parameters(**{**none, weight: 1}) == {*maps, "cross_scale"}
    for weight in ("vrd_weight", "vrd_contrastive_weight"):
        assert own_parameters(**{**none, weight: 1}) == {*maps, "image_scale", "text_scale"}


@pytest.mark.parametrize("projector", ["own", "shared"])
def test_hints_and_bank_are_those_of_clip_kd(projector: str) -> None:
    lent = {**LENT, "projector": projector}
    ours, other = clip_rd(**lent), make_method("clip_kd", settings=lent)
    state = ours.state_dict()
    known = {name: state.get(name, value) for name, value in other.state_dict().items()}
    assert [name for name in known if name not in state] == ["interactive_scale"]
    other.load_state_dict(known)
    for step in range(3):  # the bank fills
        batch = random_batch(4, seed=step)
        terms, expected = ours.terms(batch), other.terms(batch)
        assert terms.keys() == {*TERMS, "hints", "bank"}
        for name in ("hints", "bank", "feature", "interactive", "contrastive"):
            assert terms[name].weight == expected[name].weight
            torch.testing.assert_close(terms[name].value, expected[name].value)
    assert terms["bank"].value > 0


def test_what_is_lent_changes_no_other_term() -> None:
    plain, lent = clip_rd(), clip_rd(**LENT)
    for name, value in plain.state_dict().items():  # modules of hints draw last
        torch.testing.assert_close(lent.state_dict()[name], value)
    terms, expected = lent.terms(random_batch(4)), plain.terms(random_batch(4))
    assert terms.keys() - expected.keys() == {"hints", "bank"}
    for name, term in expected.items():
        torch.testing.assert_close(terms[name].value, term.value)


def test_negative_weights_and_unknown_forms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"xrd_weight: .*>= 0"):
        ClipRDConfig.from_mapping({"name": "clip_rd", "xrd_weight": -1})
    with pytest.raises(ValueError, match=r"task_space: .*'own' or 'official'"):
        ClipRDConfig.from_mapping({"name": "clip_rd", "task_space": "teacher"})


# ------------------------------------------------------------------------------------------------ scales


@pytest.mark.parametrize(("form", "start"), [("exp", 1 / 0.07), ("official", math.log(1 / 0.07))])
def test_scales_begin_as_published_and_multiply_cosines(form: str, start: float) -> None:
    method, batch = clip_rd(dim=16, scale=form), random_batch(4)
    student, teacher = method.encode_student(batch), method.encode_teacher(batch)
    expected = contrastive_loss(student.image.embedding, teacher.image.embedding, logit_scale=start)
    expected = expected + contrastive_loss(student.text.embedding, teacher.text.embedding, logit_scale=start)
    torch.testing.assert_close(method.terms(batch)["vrd_contrastive"].value, expected)


def test_all_three_scales_learn_and_stay_in_range() -> None:
    method = clip_rd()
    torch.stack([term.value for term in method.terms(random_batch(4)).values()]).sum().backward()
    for name in SCALES:
        scale = getattr(method, name)
        assert scale.grad is not None
        assert scale.grad.item() != 0
        for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
            nn.init.constant_(scale, start)
            method.after_step(StepInfo())
            assert scale.item() == pytest.approx(end)


def test_the_published_raw_scales_are_not_clamped() -> None:
    method = clip_rd(scale="official")
    for name in SCALES:
        nn.init.constant_(getattr(method, name), 9.0)
    method.after_step(StepInfo())
    assert [getattr(method, name).item() for name in SCALES] == [9.0] * 3


def test_the_scale_of_texts_learns_by_the_contrastive_term_alone() -> None:
    method = clip_rd()
    terms = method.terms(random_batch(4))
    assert method.text_scale is not None
    for name in TERMS:
        [gradient] = torch.autograd.grad(terms[name].value, [method.text_scale], retain_graph=True, allow_unused=True)
        assert (gradient is not None) == (name == "vrd_contrastive"), name

"""CLIP-KD: its terms against the published loss class, and how the method is put together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.masks import hidden_squares, hide
from cmapkd.features import PairProjector
from cmapkd.features.projector import Fusion
from cmapkd.methods import StepInfo
from cmapkd.methods.clip_kd import PUBLISHED_GRADIENT_WEIGHT, ClipKD, ClipKDConfig
from cmapkd.methods.in_batch import PUBLISHED_FEATURE_WEIGHT
from cmapkd.models import Features, LevelRequest, TowerFeatures
from cmapkd.objectives import (
    contrastive_loss,
    feature_distance,
    gradient_distance,
    interactive_divergence,
    interactive_loss,
    level_distance,
    similarity_divergence,
)
from helpers import CLIP_KD_IN_FULL, make_method, make_model, make_teacher, random_batch

# Numbers of `KDClipLoss` of the authors' repository; the file names commit and conditions.
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "clip_kd.json").read_text())


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def our_terms(case: dict[str, Any], image: Tensor, text: Tensor, student_scale: Tensor) -> dict[str, Tensor]:
    """The terms as `ClipKD.terms` makes them, of raw student embeddings."""
    teacher = unit(tensor(case["teacher_image"])), unit(tensor(case["teacher_text"]))
    project = PairProjector(image.shape[1], teacher[0].shape[1]).double()
    if case.get("projection"):
        project.load_state_dict({key: tensor(value) for key, value in case["projection"].items()})
    features = Features(TowerFeatures(image), TowerFeatures(text), logit_scale=student_scale)
    projected = project(features)
    mapped = projected.image.embedding, projected.text.embedding
    fusion = Fusion(image.shape[1], teacher[0].shape[1]).double()
    fusion.load_state_dict({key: tensor(value) for key, value in case["fusion"].items()})
    batch, width = teacher[0].shape
    return {
        "contrastive": contrastive_loss(image, text, logit_scale=student_scale),
        "relational": similarity_divergence(
            image, text, *teacher, student_scale=student_scale, teacher_scale=case["teacher_scale"]
        ),
        # theirs divides the logits by the scale, and is a mean over channels of gradients of the batch mean
        "gradient": gradient_distance(
            *mapped, *teacher, student_scale=1 / student_scale, teacher_scale=1 / case["teacher_scale"]
        )
        / (batch**2 * width),
        "cross": interactive_divergence(
            *mapped, *teacher, student_scale=case["interactive_scale"], teacher_scale=case["teacher_scale"]
        ),
        "augmented": contrastive_loss(*fusion([*map(unit, mapped)], teacher), logit_scale=case["interactive_scale"]),
        "interactive": interactive_loss(*mapped, *teacher, logit_scale=case["interactive_scale"]),
        # the published term is a mean over channels, ours a sum
        "feature": (feature_distance(mapped[0], teacher[0]) + feature_distance(mapped[1], teacher[1]))
        / teacher[0].shape[1],
    }


@pytest.mark.parametrize("number", range(len(PUBLISHED["cases"])))
@pytest.mark.parametrize(
    "name", ["contrastive", "relational", "interactive", "feature", "gradient", "cross", "augmented"]
)
def test_term_equals_the_published_code(number: int, name: str) -> None:
    case = PUBLISHED["cases"][number]
    expected = case["expected"][name]
    raw = [tensor(case["student_image"]).requires_grad_(), tensor(case["student_text"]).requires_grad_()]
    scale = tensor(case["student_scale"]).requires_grad_()
    value = our_terms(case, *raw, scale)[name]
    assert value.item() == pytest.approx(expected["value"], rel=1e-9)
    if "gradient_scale" in expected:
        (of_scale,) = torch.autograd.grad(value, scale, retain_graph=True)
        assert of_scale.item() == pytest.approx(expected["gradient_scale"], rel=1e-9)
    for gradient, key in zip(torch.autograd.grad(value, raw), ("gradient_image", "gradient_text"), strict=True):
        torch.testing.assert_close(gradient, tensor(expected[key]), rtol=1e-9, atol=1e-12)


def test_published_feature_weight_is_restated_for_the_sum() -> None:
    student, teacher = torch.randn(2, 3, 512, dtype=torch.float64)
    published = 2000 * nn.functional.mse_loss(unit(student), unit(teacher))
    torch.testing.assert_close(PUBLISHED_FEATURE_WEIGHT * feature_distance(student, teacher), published)


def test_published_gradient_weight_is_restated_for_the_sum_over_channels_and_batch() -> None:
    draws = torch.Generator().manual_seed(0)
    image, text, t_image, t_text = (
        unit(torch.randn(1024, 512, generator=draws, dtype=torch.float64)) for _ in range(4)
    )

    def residual(anchors: Tensor, candidates: Tensor, temperature: float) -> Tensor:
        return (anchors @ candidates.T / temperature).softmax(-1) - torch.eye(1024, dtype=torch.float64)

    published = torch.zeros((), dtype=torch.float64)
    for p, k, teachers_p, teachers_k in ((image, text, t_image, t_text), (text, image, t_text, t_image)):
        ours, theirs = residual(p, k, 20.0), residual(teachers_p, teachers_k, 50.0)
        for mine, target in (
            (ours @ k / 20.0, theirs @ teachers_k / 50.0),
            (ours.T @ p / 20.0, theirs.T @ teachers_p / 50.0),
        ):
            published += 1e8 * nn.functional.mse_loss(mine / 1024, target / 1024)
    value = gradient_distance(image, text, t_image, t_text, student_scale=1 / 20.0, teacher_scale=1 / 50.0)
    torch.testing.assert_close(PUBLISHED_GRADIENT_WEIGHT * value, published)


def test_default_terms_and_weights() -> None:
    terms = make_method("clip_kd").terms(random_batch(4))
    assert {name: term.weight for name, term in terms.items()} == {
        "contrastive": 1.0,
        "relational": 1.0,
        "feature": PUBLISHED_FEATURE_WEIGHT,
        "interactive": 1.0,
    }
    assert all(term.value.shape == () and term.value.dtype == torch.float32 for term in terms.values())


WEIGHTS = {
    "task_weight": "contrastive",
    "relational_weight": "relational",
    "feature_weight": "feature",
    "masked_weight": "masked_feature",
    "gradient_weight": "gradient",
    "interactive_weight": "interactive",
    "cross_weight": "cross",
    "augmented_weight": "augmented",
    "bank_weight": "bank",
    "hints": "hints",
}


@pytest.mark.parametrize(("weight", "term"), WEIGHTS.items())
def test_a_weight_of_zero_switches_a_term_off_and_changes_no_other(weight: str, term: str) -> None:
    off: Any = {} if weight == "hints" else 0
    full = make_method("clip_kd", settings=CLIP_KD_IN_FULL)
    less = make_method("clip_kd", settings={**CLIP_KD_IN_FULL, weight: off})
    weights = full.state_dict()
    less.load_state_dict({name: weights[name] for name in less.state_dict()})  # fewer parts begin with other draws
    everything, rest = full.terms(random_batch(4)), less.terms(random_batch(4))
    assert everything.keys() == set(WEIGHTS.values())
    assert rest.keys() == everything.keys() - {term}
    for name in rest:
        torch.testing.assert_close(rest[name].value, everything[name].value)


def test_a_weight_is_not_part_of_the_value() -> None:
    doubled = make_method("clip_kd", settings={"feature_weight": 8.0}).terms(random_batch(4))["feature"]
    single = make_method("clip_kd", settings={"feature_weight": 4.0}).terms(random_batch(4))["feature"]
    assert (doubled.weight, single.weight) == (8.0, 4.0)
    torch.testing.assert_close(doubled.value, single.value)


def own_parameters(method: nn.Module) -> set[str]:
    return {name for name, _ in method.named_parameters() if not name.startswith("student.")}


def test_projector_stands_only_where_widths_differ() -> None:
    maps = {f"project.{side}.{part}" for side in ("image", "text") for part in ("weight", "bias")}
    assert own_parameters(make_method("clip_kd")) == {*maps, "interactive_scale"}
    assert own_parameters(make_method("clip_kd", teacher=make_teacher(dim=16))) == {"interactive_scale"}
    assert own_parameters(make_method("clip_kd", settings={"interactive_weight": 0})) == maps
    none = {"interactive_weight": 0, "feature_weight": 0}
    assert own_parameters(make_method("clip_kd", settings=none)) == set()
    for weight in ("masked_weight", "gradient_weight"):
        assert own_parameters(make_method("clip_kd", settings={**none, weight: 1, "mask_patch": 8})) == maps
    assert own_parameters(make_method("clip_kd", settings={**none, "cross_weight": 1})) == {*maps, "interactive_scale"}
    fusions = {f"fusion.{side}.{part}" for side in ("image", "text") for part in ("weight", "bias")}
    augmented = {*maps, *fusions, "fusion_scale"}
    assert own_parameters(make_method("clip_kd", settings={**none, "augmented_weight": 1})) == augmented


def test_student_that_is_the_teacher_has_no_feature_and_relational_loss() -> None:
    model = make_model(dim=24, image_size=24)
    method = make_method("clip_kd", student=model, teacher=make_teacher(dim=24, seed=0))
    batch = random_batch(4)
    batch.inputs["student"] = batch.inputs["teacher"]
    terms = method.terms(batch)
    assert terms["feature"].value.item() == pytest.approx(0, abs=1e-6)
    assert terms["relational"].value.item() == pytest.approx(0, abs=1e-6)
    assert terms["contrastive"].value.item() > 0.1


@pytest.mark.parametrize(("mode", "scale"), [("exp", 1 / 0.07), ("official", math.log(1 / 0.07))])
def test_interactive_scale(mode: str, scale: float) -> None:
    teacher = make_teacher(dim=16)
    method = make_method("clip_kd", teacher=teacher, settings={"interactive_scale": mode})
    batch = random_batch(4)
    student, answers = method.encode_student(batch), method.encode_teacher(batch)
    expected = interactive_loss(
        student.image.embedding,
        student.text.embedding,
        answers.image.embedding,
        answers.text.embedding,
        logit_scale=scale,
    )
    torch.testing.assert_close(method.terms(batch)["interactive"].value, expected)


def test_interactive_scale_is_trained_and_kept_in_range() -> None:
    method = make_method("clip_kd")
    assert isinstance(method, ClipKD)
    assert method.interactive_scale is not None
    method.terms(random_batch(4))["interactive"].value.backward()
    assert method.interactive_scale.grad is not None
    assert method.interactive_scale.grad.item() != 0
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        nn.init.constant_(method.interactive_scale, start)
        method.after_step(StepInfo())
        assert method.interactive_scale.item() == pytest.approx(end)


def test_the_published_raw_scale_is_not_clamped() -> None:
    method = make_method("clip_kd", settings={"interactive_scale": "official"})
    assert isinstance(method, ClipKD)
    assert method.interactive_scale is not None
    nn.init.constant_(method.interactive_scale, 9.0)
    method.after_step(StepInfo())
    assert method.interactive_scale.item() == 9.0


def test_the_learned_scale_of_the_fused_embeddings_is_kept_in_range_too() -> None:
    for mode, end in (("exp", math.log(100)), ("official", 9.0)):
        method = make_method("clip_kd", settings={"augmented_weight": 1, "interactive_scale": mode})
        assert isinstance(method, ClipKD)
        assert method.fusion_scale is not None
        nn.init.constant_(method.fusion_scale, 9.0)
        method.after_step(StepInfo())
        assert method.fusion_scale.item() == pytest.approx(end)


@pytest.mark.parametrize("convention", ["paper", "official"])
def test_gradient_convention(convention: str) -> None:
    settings = {"gradient_weight": 1.0, "gradient_convention": convention}
    method = make_method("clip_kd", teacher=make_teacher(dim=16), settings=settings)
    batch = random_batch(4)
    student, teacher = method.encode_student(batch), method.encode_teacher(batch)
    scales = [float(each.logit_scale.detach()) ** (1 if convention == "paper" else -1) for each in (student, teacher)]
    expected = gradient_distance(
        student.image.embedding,
        student.text.embedding,
        teacher.image.embedding,
        teacher.text.embedding,
        student_scale=scales[0],
        teacher_scale=scales[1],
    )
    torch.testing.assert_close(method.terms(batch)["gradient"].value, expected)


def test_masked_feature_goes_through_the_map_that_both_modalities_share() -> None:
    settings = {"masked_weight": 1.0, "mask_patch": 4, "mask_ratio": 0.5, "projector": "shared"}
    method, batch = make_method("clip_kd", settings=settings), random_batch(4)
    squares = hidden_squares(batch.ids, view=batch.view, image_size=16, patch=4, ratio=0.5)
    masked = method.student.encode_image(hide(batch.inputs["student"].images, squares, patch=4))
    teacher, text = method.encode_teacher(batch), method.project(method.encode_student(batch)).text
    expected = feature_distance(method.project.both(masked.embedding), teacher.image.embedding)
    expected = expected + feature_distance(text.embedding, teacher.text.embedding)
    torch.testing.assert_close(method.terms(batch)["masked_feature"].value, expected)


def test_masked_feature_compares_the_masked_picture_with_the_whole() -> None:
    settings = {"masked_weight": 1.0, "mask_patch": 4, "mask_ratio": 0.5}
    method = make_method("clip_kd", teacher=make_teacher(dim=16), settings=settings)
    batch = random_batch(4)
    terms = method.terms(batch)
    squares = hidden_squares(batch.ids, view=batch.view, image_size=16, patch=4, ratio=0.5)
    masked = method.student.encode_image(hide(batch.inputs["student"].images, squares, patch=4))
    student, teacher = method.encode_student(batch), method.encode_teacher(batch)
    expected = feature_distance(masked.embedding, teacher.image.embedding)
    expected = expected + feature_distance(student.text.embedding, teacher.text.embedding)
    torch.testing.assert_close(terms["masked_feature"].value, expected)
    assert not torch.isclose(terms["masked_feature"].value, terms["feature"].value)


def test_a_mask_that_hides_all_or_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1 squares of 16, of which a share of 0.75 hides 1: some must be hidden"):
        make_method("clip_kd", settings={"masked_weight": 1.0})
    with pytest.raises(ConfigError, match=r"256 squares of 1, of which a share of 0.999 hides 256"):
        make_method("clip_kd", settings={"masked_weight": 1.0, "mask_patch": 1, "mask_ratio": 0.999})


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"relational_weight: .*>= 0"):
        ClipKDConfig.from_mapping({"name": "clip_kd", "relational_weight": -1})


# ------------------------------------------------------------------------------------------- given what cmapkd has


HINTS = {"P2": 16.0, "L1": 4.0, "L2": 2.0, "L3": 1.0}


def test_hints_are_the_weighted_distances_of_the_levels() -> None:
    method, batch = make_method("clip_kd", settings={"hints": HINTS}), random_batch(4)
    assert isinstance(method, ClipKD)
    assert method.hints is not None
    inputs = {role: batch.inputs[role] for role in ("student", "teacher")}
    teacher = method.teachers["teacher"](batch, method.teacher_needs)
    student = method.student(inputs["student"], method.student_needs)
    matched = method.hints.match.match_visual(student, teacher, HINTS)
    matched |= method.hints.match.match_language(batch, student, teacher, HINTS)
    assert matched.keys() == HINTS.keys()
    expected = sum(HINTS[name] * level_distance(it.student, it.teacher, it.mask).mean() for name, it in matched.items())
    torch.testing.assert_close(method.terms(batch)["hints"].value, expected)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_clip_kd_that_is_given_everything_is_cmapkd(micro_batch: int | None) -> None:
    bank = {"size": 8, "sample": 4, "store": "fp32"}
    given = make_method(
        "clip_kd",
        settings={
            "feature_weight": 1.0,
            "relational_weight": 0.7,
            "hints": HINTS,
            "bank_weight": 1.0,
            "bank": bank,
            "projector": "shared",
        },
    )
    levels = {
        "visual_levels": {"P2": HINTS["P2"], "P5": 1.0},
        "language_levels": {name: HINTS[name] for name in ("L1", "L2", "L3")} | {"L4": 1.0},
    }
    weights = {"interactive_weight": 1.0, "relational_weight": 0.7, "bank_weight": 1.0}
    cmapkd = make_method("cmapkd", settings={**levels, **weights, "bank": bank})
    own = cmapkd.state_dict()
    given.load_state_dict({name: own[name.removeprefix("hints.")] for name in given.state_dict()})
    totals, gradients = [], []
    for method in (given, cmapkd):
        method.micro_batch = micro_batch
        for step in range(4):  # the bank fills, and is larger than its sample
            method.zero_grad()
            method.step = StepInfo(step=step, total=4)
            loss = sum(term.weight * term.value for term in method.terms(random_batch(6, seed=step)).values())
            assert isinstance(loss, Tensor)
            loss.backward()
            totals.append(loss.item())
        gradients.append({name: p.grad for name, p in method.student.named_parameters() if p.grad is not None})
    assert totals[:4] == pytest.approx(totals[4:], rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_without_hints_no_levels_are_read_and_with_them_as_finely_as_they_need() -> None:
    read = make_method("clip_kd")
    assert (read.student_needs, read.teacher_needs, read.teacher_detail) == (LevelRequest(), LevelRequest(), "global")
    read = make_method("clip_kd", settings={"hints": {"L3": 1.0, "P2": 0.0}})
    assert (read.student_needs.image_levels, read.teacher_detail) == ((), "pooled")
    assert read.student_needs.text_levels
    assert make_method("clip_kd", settings={"hints": {"P2": 1.0}}).teacher_detail == "dense"


@pytest.mark.parametrize(
    ("hints", "words"),
    [
        ({"P6": 1}, r"hints: .*unknown level 'P6'; known: P2, P3, P4, L1, L2, L3|unknown level 'P6', did you mean"),
        ({"P5": 1}, "unknown level 'P5'"),
        ({"P2": -1}, "P2 is -1, weights are not negative"),
    ],
)
def test_hints_that_are_no_levels_are_refused(hints: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ClipKDConfig.from_mapping({"name": "clip_kd", "hints": hints})

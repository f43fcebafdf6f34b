"""CLIP-KD: its terms against the published loss class, and how the method is put together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmapkd.features import PairProjector
from cmapkd.methods.clip_kd import PUBLISHED_FEATURE_WEIGHT, ClipKD, ClipKDConfig
from cmapkd.models import Features, TowerFeatures
from cmapkd.objectives import contrastive_loss, feature_distance, interactive_loss, similarity_divergence
from helpers import make_method, make_model, make_teacher, random_batch

# Numbers of `KDClipLoss` of the authors' repository; the file names commit and conditions.
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "clip_kd.json").read_text())


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def our_terms(case: dict[str, Any], image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """The terms as `ClipKD.terms` makes them, of raw student embeddings."""
    teacher = unit(tensor(case["teacher_image"])), unit(tensor(case["teacher_text"]))
    project = PairProjector(image.shape[1], teacher[0].shape[1]).double()
    if case.get("projection"):
        project.load_state_dict({key: tensor(value) for key, value in case["projection"].items()})
    features = Features(TowerFeatures(image), TowerFeatures(text), logit_scale=tensor(case["student_scale"]))
    projected = project(features)
    mapped = projected.image.embedding, projected.text.embedding
    return {
        "contrastive": contrastive_loss(image, text, logit_scale=case["student_scale"]),
        "relational": similarity_divergence(
            image, text, *teacher, student_scale=case["student_scale"], teacher_scale=case["teacher_scale"]
        ),
        "interactive": interactive_loss(*mapped, *teacher, logit_scale=case["interactive_scale"]),
        # the published term is a mean over channels, ours a sum
        "feature": (feature_distance(mapped[0], teacher[0]) + feature_distance(mapped[1], teacher[1]))
        / teacher[0].shape[1],
    }


@pytest.mark.parametrize("number", range(len(PUBLISHED["cases"])))
@pytest.mark.parametrize("name", ["contrastive", "relational", "interactive", "feature"])
def test_term_equals_the_published_code(number: int, name: str) -> None:
    case = PUBLISHED["cases"][number]
    expected = case["expected"][name]
    raw = [tensor(case["student_image"]).requires_grad_(), tensor(case["student_text"]).requires_grad_()]
    value = our_terms(case, *raw)[name]
    assert value.item() == pytest.approx(expected["value"], rel=1e-9)
    for gradient, key in zip(torch.autograd.grad(value, raw), ("gradient_image", "gradient_text"), strict=True):
        torch.testing.assert_close(gradient, tensor(expected[key]), rtol=1e-9, atol=1e-12)


def test_published_feature_weight_is_restated_for_the_sum() -> None:
    student, teacher = torch.randn(2, 3, 512, dtype=torch.float64)
    published = 2000 * nn.functional.mse_loss(unit(student), unit(teacher))
    torch.testing.assert_close(PUBLISHED_FEATURE_WEIGHT * feature_distance(student, teacher), published)


def test_default_terms_and_weights() -> None:
    terms = make_method("clip_kd").terms(random_batch(4))
    assert {name: term.weight for name, term in terms.items()} == {
        "contrastive": 1.0,
        "relational": 1.0,
        "feature": PUBLISHED_FEATURE_WEIGHT,
        "interactive": 1.0,
    }
    assert all(term.value.shape == () and term.value.dtype == torch.float32 for term in terms.values())


@pytest.mark.parametrize(
    ("weight", "term"),
    [
        ("task_weight", "contrastive"),
        ("relational_weight", "relational"),
        ("feature_weight", "feature"),
        ("interactive_weight", "interactive"),
    ],
)
def test_a_weight_of_zero_switches_a_term_off_and_changes_no_other(weight: str, term: str) -> None:
    everything = make_method("clip_kd").terms(random_batch(4))
    rest = make_method("clip_kd", settings={weight: 0}).terms(random_batch(4))
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
        method.after_step()
        assert method.interactive_scale.item() == pytest.approx(end)


def test_the_published_raw_scale_is_not_clamped() -> None:
    method = make_method("clip_kd", settings={"interactive_scale": "official"})
    assert isinstance(method, ClipKD)
    assert method.interactive_scale is not None
    nn.init.constant_(method.interactive_scale, 9.0)
    method.after_step()
    assert method.interactive_scale.item() == 9.0


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"relational_weight: .*greater than or equal to 0"):
        ClipKDConfig.from_mapping({"name": "clip_kd", "relational_weight": -1})

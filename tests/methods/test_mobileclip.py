"""MobileCLIP: its loss against the published class, one teacher against `hinton`, and several teachers together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.methods.stages import StageConfig
from cmapkd.objectives import contrastive_loss, ensemble_divergence, similarity_divergence
from helpers import make_method, random_batch, second_teacher

# Numbers of `DRClipLoss` of the authors' patch to open_clip; the file names commit and conditions.
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "mobileclip.json").read_text())


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def mean_probabilities(teachers: list[tuple[Tensor, Tensor]], scales: list[float]) -> tuple[Tensor, Tensor]:
    """Of the texts of each image, and of the images of each text; in loops."""
    size = len(teachers[0][0])
    over_texts, over_images = torch.zeros(2, size, size, dtype=torch.float64)
    for (image, text), scale in zip(teachers, scales, strict=True):
        image, text = unit(image), unit(text)
        for i in range(size):
            of_image = torch.stack([scale * image[i] @ text[j] for j in range(size)]).exp()
            of_text = torch.stack([scale * text[i] @ image[j] for j in range(size)]).exp()
            over_texts[i] += of_image / of_image.sum() / len(teachers)
            over_images[i] += of_text / of_text.sum() / len(teachers)
    return over_texts, over_images


def entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.log()).sum(-1).mean()


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: case["name"])
def test_loss_equals_the_published_code(case: dict[str, Any]) -> None:
    keys = ("image", "text", "synthetic", "student_scale")
    image, text, synthetic, scale = leaves = [tensor(PUBLISHED[key]).requires_grad_() for key in keys]
    task, distilled = case["weights"]
    contrastive, distill, missing = tensor(0.0), tensor(0.0), 0.0
    pairs = [(text, "teacher_texts"), (synthetic, "teacher_synthetic")][: 2 if case["synthetic"] else 1]
    for ours, key in pairs:
        theirs = [(tensor(a), tensor(b)) for a, b in zip(PUBLISHED["teacher_images"], PUBLISHED[key], strict=True)]
        theirs = theirs[: len(case["teacher_scales"])]
        contrastive = contrastive + contrastive_loss(image, ours, logit_scale=scale)
        distill = distill + ensemble_divergence(
            image, ours, theirs, student_scale=scale, teacher_scales=case["teacher_scales"]
        )
        missing += sum(float(entropy(p)) for p in mean_probabilities(theirs, case["teacher_scales"])) / 2
    assert (task * contrastive).item() == pytest.approx(case["contrastive"], rel=1e-9)
    # the published term is the cross-entropy: the divergence and the entropy of its target
    assert (distilled * (distill + missing)).item() == pytest.approx(case["distill"], rel=1e-9)
    loss = task * contrastive + distilled * distill
    for found, expected in zip(torch.autograd.grad(loss, leaves, allow_unused=True), case["gradients"], strict=True):
        if expected is None:
            assert found is None
        else:
            torch.testing.assert_close(found, tensor(expected), rtol=1e-8, atol=1e-11)


def sides(seed: int, *widths: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(5, width, generator=draws, dtype=torch.float64) for width in widths]


def test_divergence_from_the_mean_written_out() -> None:
    image, text, a, b, c, d = sides(1, 4, 4, 3, 3, 6, 6)
    value = ensemble_divergence(image, text, [(a, b), (c, d)], student_scale=5.0, teacher_scales=[9.0, 2.0])
    targets = mean_probabilities([(a, b), (c, d)], [9.0, 2.0])
    ours = mean_probabilities([(image, text)], [5.0])
    expected = 0.0
    for target, own in zip(targets, ours, strict=True):
        assert target.sum(-1).tolist() == pytest.approx([1.0] * 5)  # each direction is a distribution of its own
        for i in range(5):
            expected += sum(float(target[i, j] * (target[i, j] / own[i, j]).log()) for j in range(5)) / 5 / 2
    assert float(value) == pytest.approx(expected, rel=1e-10)


def test_the_mean_is_of_probabilities_and_not_of_logits() -> None:
    image, text, a, b = sides(2, 4, 4, 4, 4)
    scales = [30.0, 3.0]
    value = ensemble_divergence(image, text, [(a, b), (b, a)], student_scale=5.0, teacher_scales=scales)
    z = [scale * unit(x) @ unit(y).T for (x, y), scale in zip([(a, b), (b, a)], scales, strict=True)]
    own = (5.0 * unit(image) @ unit(text).T).log_softmax(-1)
    logits = sum(z) / 2
    of_logits = torch.nn.functional.kl_div(own, logits.log_softmax(-1), reduction="batchmean", log_target=True)
    assert abs(float(value) - float(of_logits)) > 0.1


def test_zero_at_the_mean_and_gradient_of_the_mean_of_divergences() -> None:
    a, b, c, d = sides(3, 4, 4, 6, 6)
    same = ensemble_divergence(a, b, [(a, b), (a, b)], student_scale=5.0, teacher_scales=[5.0, 5.0])
    assert float(same) == pytest.approx(0.0, abs=1e-12)
    image, text = (x.requires_grad_() for x in sides(4, 4, 4))
    teachers, scales = [(a, b), (c, d)], [9.0, 2.0]
    together = ensemble_divergence(image, text, teachers, student_scale=5.0, teacher_scales=scales)
    each = [
        similarity_divergence(image, text, *pair, student_scale=5.0, teacher_scale=scale)
        for pair, scale in zip(teachers, scales, strict=True)
    ]
    apart = torch.stack(each).mean()
    for one, other in zip(*(torch.autograd.grad(value, [image, text]) for value in (together, apart)), strict=True):
        torch.testing.assert_close(one, other)
    assert together.item() < apart.item()  # by how much the teachers disagree


def test_teachers_without_a_scale_each_are_refused() -> None:
    a, b = sides(5, 4, 4)
    with pytest.raises(ValueError, match="2 teachers with 1 scales"):
        ensemble_divergence(a, b, [(a, b), (a, b)], student_scale=5.0, teacher_scales=[5.0])


def test_with_one_teacher_it_is_hinton() -> None:
    batch = random_batch(5)
    ours = make_method("mobileclip", settings={"task_weight": 1, "distill_weight": 1})(batch)
    theirs = make_method("hinton")(batch)
    assert ours.keys() == theirs.keys()
    for name, term in ours.items():
        torch.testing.assert_close(term.value, theirs[name].value, rtol=1e-6, atol=1e-7)
        assert term.weight == theirs[name].weight


def two_teachers(**settings: Any) -> Any:
    return make_method("mobileclip", settings=settings, more_teachers=[second_teacher()])


def test_terms_of_both_caption_sets() -> None:
    method = two_teachers(synthetic=True, task_weight=0.5, distill_weight=2.0, teacher_scales=[7.0, 4.0])
    batch = random_batch(5, rich=True)
    terms = method(batch)
    assert {name: term.weight for name, term in terms.items()} == {
        "contrastive": 0.5, "similarity": 2.0, "contrastive_synthetic": 0.5, "similarity_synthetic": 2.0,
    }  # fmt: skip
    assert tuple(terms) == method.term_names
    student, teachers = method.encode_student(batch), method.encode_teachers(batch)
    assert [*teachers] == ["teacher", "second"]
    assert [each.image.embedding.shape[1] for each in teachers.values()] == [24, 8]
    expected = ensemble_divergence(
        student.image.embedding,
        student.more_texts["synthetic"].embedding,
        [(each.image.embedding, each.more_texts["synthetic"].embedding) for each in teachers.values()],
        student_scale=student.logit_scale,
        teacher_scales=[7.0, 4.0],
    )
    torch.testing.assert_close(terms["similarity_synthetic"].value, expected)
    assert not torch.isclose(terms["similarity"].value, expected)


def test_scales_are_the_teachers_own_unless_given() -> None:
    batch = random_batch(5, rich=True)
    own = 1 / 0.07  # of untrained models
    values = [
        two_teachers(**given)(batch)["similarity"].value
        for given in ({}, {"teacher_scales": own}, {"teacher_scales": [own, own]}, {"teacher_scales": 50.0})
    ]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])
    assert not torch.isclose(values[0], values[3])
    with pytest.raises(ConfigError, match="has 3 numbers for the 2 teachers teacher, second"):
        two_teachers(teacher_scales=[1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="is positive, got"):
        two_teachers(teacher_scales=[1.0, 0.0])


def test_a_stage_without_distillation_asks_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    method = two_teachers()
    method.enter(StageConfig(share=1.0, terms=("contrastive",)))
    monkeypatch.setattr(type(method), "encode_teachers", lambda *_: pytest.fail("a teacher was asked"))
    assert [*method(random_batch(4, rich=True))] == ["contrastive"]


def test_other_methods_refuse_a_second_teacher() -> None:
    with pytest.raises(
        ConfigError, match=r"clip_kd learns from one teacher, and more_teachers names second besides.*mobileclip"
    ):
        make_method("clip_kd", more_teachers=[second_teacher()])
    assert make_method("contrastive", more_teachers=[second_teacher()]).teachers == {}


def test_pure_distillation_still_moves_the_scale() -> None:
    """Weights 0 and 1, as most published runs: no hard label, and the student's scale follows the teachers alone."""
    method = two_teachers(task_weight=0.0, distill_weight=1.0)
    terms = method(random_batch(6, rich=True))
    assert [*terms] == ["similarity"]
    terms["similarity"].value.backward()
    assert method.student.log_logit_scale.grad is not None
    assert math.isfinite(float(method.student.log_logit_scale.grad))
    assert float(method.student.log_logit_scale.grad) != 0

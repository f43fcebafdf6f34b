"""TinyCLIP: affinities against the published loss class; the fixed scale."""

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
from cmapkd.objectives import contrastive_loss, similarity_divergence
from cmapkd.objectives.common import unit
from helpers import make_method, make_trainer, random_batch

# Numbers of `ClipSoftLoss` of the authors' repository; the file names commit and conditions.
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "tinyclip.json").read_text())


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", PUBLISHED["losses"])
def test_affinity_equals_the_published_code(case: dict[str, Any]) -> None:
    teacher = tensor(PUBLISHED["teacher_image"]), tensor(PUBLISHED["teacher_text"])
    leaves = [tensor(PUBLISHED[key]).requires_grad_() for key in ("image", "text")]
    leaves.append(tensor(case["student_scale"]).requires_grad_())
    image, text, scale = leaves
    value = similarity_divergence(image, text, *teacher, student_scale=scale, teacher_scale=case["teacher_scale"])
    logits = case["teacher_scale"] * unit(teacher[0]) @ unit(teacher[1]).T
    entropy = sum(-(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean() for z in (logits, logits.T)) / 2
    assert (value + entropy).item() == pytest.approx(case["value"], rel=1e-9)  # the published one is a cross-entropy
    for found, expected in zip(torch.autograd.grad(value, leaves), case["gradients"], strict=True):
        torch.testing.assert_close(found, tensor(expected), rtol=1e-8, atol=1e-11)


def test_terms_and_their_weights() -> None:
    batch = random_batch(5)
    assert make_method("tinyclip").term_names == ("affinity",)
    assert make_method("tinyclip", settings={"alpha": 0.0}).term_names == ("contrastive",)
    method = make_method("tinyclip", settings={"alpha": 0.7})
    terms = method(batch)
    assert {name: term.weight for name, term in terms.items()} == {"affinity": 0.7, "contrastive": pytest.approx(0.3)}
    student, teacher = method.encode_student(batch), method.encode_teacher(batch)
    ours, theirs = ((each.image.embedding, each.text.embedding) for each in (student, teacher))
    expected = similarity_divergence(*ours, *theirs, student_scale=50.0, teacher_scale=50.0)
    torch.testing.assert_close(terms["affinity"].value, expected)
    torch.testing.assert_close(terms["contrastive"].value, contrastive_loss(*ours, logit_scale=50.0))
    with pytest.raises(ConfigError, match="alpha"):
        make_method("tinyclip", settings={"alpha": 1.5})


def test_the_given_scale_stays_and_none_is_learned(tmp_path: Path) -> None:
    for given, moved in ((50.0, False), (None, True)):
        method = make_method("tinyclip", settings={"logit_scale": given})
        before = float(method.student.log_logit_scale.detach().exp())
        assert before == pytest.approx(given or 1 / 0.07, rel=1e-6)
        make_trainer(tmp_path / str(given), method, steps=3).run()
        after = float(method.student.log_logit_scale.detach().exp())
        assert (abs(after - before) > 1e-4) == moved
    batch = random_batch(4)
    own = make_method("tinyclip", settings={"logit_scale": None})
    assert float(own.encode_teacher(batch).logit_scale) == pytest.approx(math.exp(math.log(1 / 0.07)), rel=1e-5)


def test_a_stage_without_affinities_asks_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make_method("tinyclip", settings={"alpha": 0.5})
    method.enter(StageConfig(share=1.0, terms=("contrastive",)))
    monkeypatch.setattr(type(method), "encode_teacher", lambda *_: pytest.fail("the teacher was asked"))
    assert [*method(random_batch(4))] == ["contrastive"]

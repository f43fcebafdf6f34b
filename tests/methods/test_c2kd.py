"""C2KD: its terms by their formulas, who learns from whom, and what is refused. The losses: tests/objectives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.features.projector import ClassProxy
from cmapkd.features.pyramid import pooled
from cmapkd.methods.c2kd import C2KD
from cmapkd.methods.dual import LABELS
from cmapkd.models.texts import class_vectors
from helpers import CLASSES, make_method, random_batch

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "c2kd.json").read_text())
TERMS = ("student_labels", "teacher_labels", "student_proxy", "teacher_proxy", "to_student", "to_teacher")


def made(**settings: Any) -> C2KD:
    method = make_method("c2kd", settings={"prompts_at_once": None, **settings})
    assert isinstance(method, C2KD)
    return method.train()


def a_batch() -> Any:
    return replace(random_batch(6), extra={LABELS: torch.tensor([4, -1, 0, 0, 3, 2])})


def kl(target: Tensor, other: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(other, 1), F.softmax(target, 1), reduction="batchmean")


def test_proxy_has_the_published_shapes() -> None:
    shapes = {key: shape for key, shape in PUBLISHED["proxy"]["shapes"].items() if "num_batches" not in key}
    ours = [list(value.shape) for key, value in ClassProxy(256, 6).state_dict().items() if "num_batches" not in key]
    assert ours == [shape[:2] for shape in shapes.values()]  # a 1x1 convolution of one place is a matrix


def test_terms_are_the_formulas() -> None:
    method, batch = made(task_weight=0.5, direct_weight=2.0), a_batch()
    labels = batch.extra[LABELS]
    terms = method.terms(batch)
    assert {name: term.weight for name, term in terms.items()} == {
        **dict.fromkeys(TERMS, 1.0),
        "student_labels": 0.5,
        "teacher_labels": 0.5,
        "direct": 2.0,
    }
    image = method.student.encode_image(batch.inputs["student"].images, ("blocks.0",))
    text = method.text_model.encode_text(batch.inputs["teacher"].texts, ("blocks.0",))
    vectors = class_vectors(method.student, CLASSES.names, CLASSES.templates, device="cpu")
    z_s = method.student.log_logit_scale.exp() * F.normalize(image.embedding, dim=-1) @ vectors.T
    z_t = method.text_classifier(text.embedding)
    proxy_s = method.image_proxy(pooled(image.levels["blocks.0"]))
    proxy_t = method.text_proxy(pooled(text.levels["blocks.0"]))
    known = labels >= 0
    expected = {
        "student_labels": F.cross_entropy(z_s[known], labels[known]),
        "teacher_labels": F.cross_entropy(z_t[known], labels[known]),
        "student_proxy": kl(z_s, proxy_s) + kl(proxy_s, z_s),
        "teacher_proxy": kl(z_t, proxy_t) + kl(proxy_t, z_t),
        "direct": kl(z_t, z_s),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].value, value, rtol=1e-4, atol=1e-5)
    assert 0 <= float(method.measurements["kept"]) <= 1


def gradient_of(method: C2KD, term: str) -> set[str]:
    """Modules that a term asks something of."""
    method.zero_grad()
    method.terms(a_batch())[term].value.backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
    return {name.split(".")[0] for name in reached}


def test_each_side_learns_from_a_detached_other() -> None:
    method = made(agreement=-1.0)
    assert gradient_of(method, "to_student") == {"student", "image_proxy"}
    assert gradient_of(method, "to_teacher") == {"text_model", "text_proxy"}
    assert gradient_of(method, "teacher_labels") == {"text_model", "text_classifier"}
    assert gradient_of(method, "student_proxy") == {"student", "image_proxy"}


def test_where_nobody_agrees_nothing_is_told() -> None:
    terms, method = made(agreement=1.0).terms(a_batch()), made(agreement=1.0)
    assert terms["to_student"].value.item() == terms["to_teacher"].value.item() == 0
    method.terms(a_batch())
    assert method.measurements["kept"].item() == 0


def test_the_right_class_may_be_told_too() -> None:
    included = made(agreement=-1.0, target="included").terms(a_batch())
    left_out = made(agreement=-1.0).terms(a_batch())
    assert not torch.allclose(included["to_student"].value, left_out["to_student"].value)


def test_only_the_text_tower_of_the_copy_learns() -> None:
    method = made()
    learning = {name for name, p in method.text_model.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in method.text_model.named_parameters() if name.startswith("text.")}


def test_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method c2kd takes no teacher cache as it is set: its teacher learns too"):
        cmapkd.distill(
            "c2kd_scenes",
            data={"train": "scenes:easy?length=40", "val": None, "test": None},
            training={"steps": 2, "batch_size": 8},
            overrides=["cache=auto", "training.stages=[]"],
            quiet=True,
            out=tmp_path / "run",
        )

"""SgVA-CLIP: its terms written out, what each of them trains, how the adapted model answers, and what is refused."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.templates import ClassPrompts
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.run import evaluate
from cmapkd.methods.dual import LABELS
from cmapkd.methods.sgva_clip import SgvaClip
from cmapkd.methods.sgva_config import SgvaClipConfig
from cmapkd.methods.targets import Answered
from cmapkd.models import load_model
from cmapkd.models.adapted import AdaptedEncoder
from cmapkd.models.texts import class_vectors
from cmapkd.objectives import labelled_cross_entropy
from cmapkd.objectives.common import EXCLUDED
from cmapkd.objectives.support import support_scores
from helpers import CLASSES, made_up, make_method, make_model, make_teacher, make_trainer, random_batch

DIM = 16


def made(**settings: Any) -> SgvaClip:
    method = make_method("sgva_clip", settings=settings)
    assert isinstance(method, SgvaClip)
    return method.train()


def without(label: int) -> Any:
    """A survey in which a class has no pictures."""
    answers = Answered.joined(made_up(dim=DIM)())
    return lambda **_: iter([replace(answers, labels=torch.where(answers.labels == label, -1, answers.labels))])


def adapted_by_hand(method: SgvaClip, x: Tensor) -> Tensor:
    adapter = method.student.adapter
    changed = adapter.outer.weight @ (adapter.inner.weight @ x).clamp_min(0)
    mixed = (adapter.alpha * changed + (1 - adapter.alpha) * x).clamp_min(0)
    return mixed / mixed.norm()


def test_terms_are_the_loops() -> None:
    method = made(shots=3, prototype_weight=2.0, distill_weight=3.0, temperature=4.0).double()
    assert method.teacher is not None
    method.teacher.model.double()
    method.prepare(without(2))
    answers = Answered.joined(without(2)())
    labels = torch.tensor([4, -1, 0, 1, 3, -1])
    batch = replace(random_batch(6, dtype=torch.float64), extra={LABELS: labels})
    with torch.no_grad():
        terms = method.terms(batch)
        teacher = method.encode_teacher(batch)
        v, s = F.normalize(teacher.image.embedding, dim=-1), float(teacher.logit_scale)
        inner = method.student.model
        words = inner.tokenizer([f"{name}." for name in CLASSES.names])
        w = F.normalize(inner.encode_text(words).embedding, dim=-1)
        totals = dict.fromkeys(("prototypes", "classes", "labels"), 0.0)
        for i in range(6):
            a = adapted_by_hand(method, v[i])
            by_pictures = []
            for c in (0, 1, 3, 4):
                rows = [k for k in range(40) if int(answers.labels[k]) == c][:3]
                rows = [k for k in rows if k != i]  # the batch has the samples m0 to m5, too
                pictures = [adapted_by_hand(method, F.normalize(answers.image[k].double(), dim=0)) for k in rows]
                by_pictures.append(s * float(a @ torch.stack(pictures).mean(0)))
            by_text, by_adapter = s * w @ v[i], s * w @ a
            p, q = (by_text / 4).softmax(0), (by_adapter / 4).softmax(0)
            totals["classes"] += float((p * (p / q).log()).sum()) / 6
            if labels[i] >= 0:
                place = (0, 1, 3, 4).index(int(labels[i]))
                totals["prototypes"] -= float(torch.tensor(by_pictures, dtype=torch.float64).log_softmax(0)[place]) / 4
                totals["labels"] -= float(by_text.log_softmax(0)[labels[i]]) / 4
    assert {name: term.weight for name, term in terms.items()} == {"prototypes": 2.0, "classes": 3.0, "labels": 1.0}
    for name, value in totals.items():
        assert float(terms[name].value) == pytest.approx(value, rel=1e-6), name


def test_scores_by_pictures() -> None:
    torch.manual_seed(0)
    images, support = torch.rand(3, 4, dtype=torch.float64), torch.rand(2, 3, 4, dtype=torch.float64)
    counted = torch.rand(3, 2, 3) > 0.4
    counted[1, 1] = False
    counted[0, 0] = True
    scores = support_scores(images, support, counted, 7.0)
    expected = F.normalize(images, dim=-1)[0] @ F.normalize(support, dim=-1)[0].mean(0)
    assert float(scores[0, 0]) == pytest.approx(7 * float(expected))
    assert scores[1, 1] == EXCLUDED
    unlabelled = labelled_cross_entropy(scores, torch.tensor([0, 0, -1]))  # whose loss counts with zero, and is finite
    assert bool(unlabelled.isfinite())
    labels = torch.tensor([0, 0, 1])
    counted[2, 1] = True

    def loss(one: Tensor, other: Tensor) -> Tensor:
        return labelled_cross_entropy(support_scores(one, other, counted, 7.0), labels)

    assert gradcheck(loss, (images.requires_grad_(), support.requires_grad_()))
    with pytest.raises(ValueError, match=r"images has shape \(3, 4\), support \(2, 3, 4\) and counted \(3, 2\)"):
        support_scores(images, support, counted[..., 0], 1.0)


def test_a_picture_that_is_alone_in_its_class_counts_for_itself() -> None:
    method = made(shots=1)
    counted = method._counted(random_batch(6))
    assert bool(counted.all())
    method = made(shots=2)
    counted = method._counted(random_batch(6))  # m0 to m4 are first in their classes, m5 is the second of the first
    assert counted.sum((1, 2)).tolist() == [9] * 6
    assert not counted[0, 0, 0]
    assert not counted[5, 0, 1]


def test_what_each_term_trains() -> None:
    method, batch = made(), random_batch(8)
    adapter, context = set(), {"student.model.context.tokens"}
    adapter = {f"student.adapter.{name}" for name in ("inner.weight", "outer.weight", "alpha")}
    assert {name for name, p in method.named_parameters() if p.requires_grad} == adapter | context
    for name, reached in (("prototypes", adapter), ("classes", adapter), ("labels", context)):
        method.zero_grad()
        method.terms(batch)[name].value.backward()
        assert {key for key, p in method.named_parameters() if p.grad is not None and p.grad.any()} == reached, name
    alone = made(context=None, distill_weight=0)
    assert alone.term_names == tuple(alone.terms(batch)) == ("prototypes",)
    assert {name for name, p in alone.named_parameters() if p.requires_grad} == adapter
    assert not [name for name, _ in alone.named_buffers() if "context" in name]


def test_without_context_the_evaluation_s_templates_are_the_classes() -> None:
    method = made(context=None)
    own = class_vectors(make_model(), CLASSES.names, CLASSES.templates, device="cpu")
    torch.testing.assert_close(method.frozen_vectors, own)
    assert method.student.class_templates is None


def test_an_adapter_that_changes_nothing_has_nothing_to_distil() -> None:
    """With α 0, and pictures without negative numbers, the adapted pictures are the frozen ones."""
    method = made()
    with torch.no_grad():
        method.student.adapter.alpha.zero_()
    features = method.encode_teacher(random_batch(4))
    image = replace(features.image, embedding=features.image.embedding.abs())
    method.encode_teacher = lambda _batch: replace(features, image=image)  # type: ignore[method-assign]
    assert float(method.terms(random_batch(4))["classes"].value.detach()) == pytest.approx(0, abs=1e-7)


# ------------------------------------------------------------------------------------------------ a run


def test_a_resumed_run_ends_with_the_same_bits_and_leaves_the_frozen_model_alone(tmp_path: Path) -> None:
    whole, frozen = made(), make_model().state_dict()
    make_trainer(tmp_path / "whole", whole, steps=4, checkpoint_every=2).run()
    make_trainer(tmp_path / "cut", made(), steps=2, checkpoint_every=2).run()
    again = SgvaClip(
        SgvaClipConfig(name="sgva_clip", context="red blue"),
        student=make_model(),
        teacher=make_teacher(dim=DIM),
        classes=CLASSES,
    )  # without `prepare`
    make_trainer(tmp_path / "cut", again, steps=4, checkpoint_every=2).run(resume=True)
    ours, theirs = again.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(torch.equal(ours[f"student.model.model.{key}"], value) for key, value in frozen.items())


def test_a_run_saves_a_model_that_scores_known_and_other_classes(tmp_path: Path) -> None:
    run = cmapkd.distill(
        recipe="sgva_clip_scenes",
        data={
            "train": "scenes?label=background&length=24",
            "val": None,
            "test": "scenes@test?label=background&length=20",
        },
        training={"steps": 3, "batch_size": 8, "log_every": 1},
        cache=None,
        quiet=True,
        out=tmp_path / "run",
    )
    student, config = load_model(tmp_path / "run"), EvaluationConfig(tasks=("zero_shot",))
    assert isinstance(student, AdaptedEncoder)
    source = open_source("scenes@test?label=background&length=20")
    assert evaluate(student, source, config, device="cpu")["zero_shot"] == run.metrics["student"]["zero_shot"]


def test_what_does_not_fit_is_refused() -> None:
    untrained = {"name": "sgva_clip", "prototype_weight": 0, "distill_weight": 0}
    with pytest.raises(ConfigError, match=r"nothing trains the adapter, and share gives it 0\.5 .*: set share: 0, or"):
        SgvaClipConfig.from_mapping(untrained, where="method")
    SgvaClipConfig.from_mapping({**untrained, "share": 0}, where="method")
    config = SgvaClipConfig(name="sgva_clip", context=2)
    student, copy = make_model(), make_teacher(dim=DIM)
    with pytest.raises(
        ConfigError,
        match=r"the teacher test-24 is another model .* test-16, or has other weights: set teacher: student",
    ):
        SgvaClip(config, student=student, teacher=make_teacher(), classes=CLASSES)
    trained_on = make_teacher(dim=DIM, image_size=16)
    with pytest.raises(ConfigError, match="set teacher: student"):
        SgvaClip(config, student=student, teacher=trained_on, classes=CLASSES)
    with pytest.raises(ConfigError, match="tells classes apart, and the data name one: 'cat'"):
        SgvaClip(config, student=student, teacher=copy, classes=ClassPrompts(("cat",), ("{}",)))
    with pytest.raises(ConfigError, match=r"has an adapter already: name the model without it"):
        SgvaClip(
            config,
            student=AdaptedEncoder(student, CLASSES.names, shots=1, hidden=2, share=0.5),
            teacher=copy,
            classes=CLASSES,
        )
    student.random_towers = ("image", "text")
    with pytest.raises(ConfigError, match=r"the image and text tower of test-16 has random weights: name a trained"):
        SgvaClip(config, student=student, teacher=copy, classes=CLASSES)
    with pytest.raises(ConfigError, match=r"sgva_clip: .*the context 0 is 0 tokens"):
        made(context=0)
    with pytest.raises(ConfigError, match=r"template: .*there must be \{\}"):
        made(template="a photo")
    answers = Answered.joined(made_up(dim=DIM)())
    one = replace(answers, labels=torch.where(answers.labels == 3, 3, -1))
    with pytest.raises(ConfigError, match=r"of 5 classes 1 has labelled ones in data\.train"):
        deepcopy(made()).prepare(lambda **_: iter([one]))

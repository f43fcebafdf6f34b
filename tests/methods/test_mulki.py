"""MulKI, a reconstruction: its terms written out, what its teachers are, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.config import ConfigError
from cmapkd.data.templates import ClassPrompts
from cmapkd.methods.dual import LABELS
from cmapkd.methods.mulki import PREVIOUS, Mulki, MulkiConfig
from cmapkd.methods.targets import Answered
from cmapkd.models import FrozenTeacher
from cmapkd.models.texts import class_vectors
from cmapkd.models.tiny import TinyDualEncoder
from cmapkd.objectives.prototype_relations import moved_prototypes, prototype_alignment, relation_divergences
from helpers import (
    CLASSES,
    MemorySource,
    made_up,
    make_builder,
    make_method,
    make_model,
    make_teacher,
    make_trainer,
    random_batch,
)
from surveyed import survey_of

DIM = 16
LABELLED = torch.tensor([4, -1, 0, 0, -1, 3])


def made(**settings: Any) -> Mulki:
    method = make_method("mulki", settings=settings)
    assert isinstance(method, Mulki)
    return method.train()


def batch_of(labels: Tensor = LABELLED, dtype: torch.dtype = torch.float64) -> Any:
    return replace(random_batch(len(labels), dtype=dtype), extra={LABELS: labels})


def without(label: int) -> Any:
    """A survey in which a class has no pictures."""
    answers = Answered.joined(made_up(dim=DIM)())
    return lambda *_, **__: iter([replace(answers, labels=torch.where(answers.labels == label, -1, answers.labels))])


def divergence(student: Tensor, teacher: Tensor) -> float:
    p, q = (teacher / 2).softmax(0), (student / 2).softmax(0)
    return float((p * (p / q).log()).sum()) * 4


def test_class_vectors_are_made_where_the_teacher_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(model: Any, *given: Any, device: Any, **more: Any) -> Tensor:
        asked.append(torch.device(device).type)
        return class_vectors(model, *given, device="cpu", **more)

    class Elsewhere(TinyDualEncoder):
        device = torch.device("meta")

    monkeypatch.setattr("cmapkd.methods.mulki.class_vectors", noted)
    teacher = FrozenTeacher(make_model(dim=DIM))
    config = MulkiConfig(name="mulki", teachers="initial")
    Mulki(config, student=make_model(kind=Elsewhere), teacher=teacher, classes=CLASSES)
    assert asked == ["cpu"]


def test_terms_are_the_loops() -> None:
    method = made(relation_weight=2.0, prototype_weight=3.0, momentum=0.8).double()
    method.prepare(without(2))
    assert method.teacher is not None
    method.teacher.model.double()
    shown = [0, 1, 3, 4]
    assert method.shown.tolist() == [c in shown for c in range(5)]
    batch, before = batch_of(), method.pictures.clone()
    with torch.no_grad():
        terms = method.terms(batch)
        student, s = method.encode_student(batch), float(method.student.log_logit_scale.exp())
        v = F.normalize(student.image.embedding, dim=-1)
        w = class_vectors(method.student, CLASSES.names, CLASSES.templates, device="cpu").double()
        p = before.clone()
        for c in {0, 3, 4}:
            p[c] = F.normalize(0.8 * before[c] + 0.2 * v[c == LABELLED].mean(0), dim=0)
        torch.testing.assert_close(method.pictures, p)
        labels = prototypes = 0.0
        for i in range(6):
            if LABELLED[i] >= 0:
                labels -= float((s * w @ v[i]).log_softmax(0)[LABELLED[i]]) / 4
        for place, c in enumerate(shown):
            for one, other in ((p, w), (w, p)):
                prototypes -= float((s * other[shown] @ one[c]).log_softmax(0)[place]) / 8
        found, weights = {}, {}
        for place, (role, teacher) in enumerate(method.teachers.items()):
            answers = teacher(batch)
            u, t, scale = F.normalize(answers.image.embedding, dim=-1), method.teacher_texts[place], answers.logit_scale
            q = method.teacher_pictures[place]
            for i in range(6):
                if (y := int(LABELLED[i])) < 0:
                    continue
                found[role, i] = (
                    divergence(s * p[shown] @ v[i], scale * q[shown] @ u[i])
                    + divergence(s * w @ v[i], scale * t @ u[i])
                    + divergence(s * w @ w[y], scale * t @ t[y])
                    + divergence(s * p[shown] @ w[y], scale * q[shown] @ t[y])
                )
                weights[role, i] = float((scale * t @ u[i]).softmax(0)[y])
        relations = 0.0
        for i in (0, 2, 3, 5):
            shares = torch.tensor([weights[role, i] for role in method.roles], dtype=torch.float64).softmax(0)
            relations += (
                sum(float(share) * found[role, i] for share, role in zip(shares, method.roles, strict=True)) / 4
            )
    assert method.roles == ("teacher", PREVIOUS)
    assert {name: term.weight for name, term in terms.items()} == {"labels": 1.0, "prototypes": 3.0, "relations": 2.0}
    for name, value in {"labels": labels, "prototypes": prototypes, "relations": relations}.items():
        assert float(terms[name].value) == pytest.approx(value, rel=1e-6), name


def test_objectives_have_their_gradients_and_refuse_what_does_not_fit() -> None:
    torch.manual_seed(0)
    kept = F.normalize(torch.randn(4, 3, dtype=torch.float64), dim=-1)
    images, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    labels, shown = torch.tensor([0, 0, -1, 2, 3]), torch.tensor([True, False, True, True])

    def loss(rows: Tensor) -> Tensor:
        moved = moved_prototypes(kept, rows, labels, momentum=0.7)
        logits = 3 * moved @ kept.T
        return prototype_alignment(logits, shown) + relation_divergences(logits, teacher, shown, temperature=2).mean()

    assert gradcheck(loss, images.requires_grad_())
    torch.testing.assert_close(moved_prototypes(kept, images, labels, momentum=1.0), kept)
    torch.testing.assert_close(moved_prototypes(kept, images, labels, momentum=0.3)[1], kept[1])  # not in the batch
    assert float(relation_divergences(teacher, teacher, shown, temperature=2).abs().max()) == 0
    changed = teacher.clone()
    changed[:, 1] += 5  # of the class that is no candidate
    assert float(relation_divergences(changed, teacher, shown, temperature=2).abs().max()) < 1e-12
    with pytest.raises(ValueError, match=r"images has shape \(5, 3\), labels \(4,\)"):
        moved_prototypes(kept, images, labels[:4], momentum=0.5)
    with pytest.raises(ValueError, match=r"with momentum 1\.5"):
        moved_prototypes(kept, images, labels, momentum=1.5)
    with pytest.raises(ValueError, match=r"\(4, 4\) and teacher_logits \(4, 3\)"):
        relation_divergences(teacher, kept, temperature=2)


def test_a_student_that_is_both_its_teachers_has_nothing_to_distil() -> None:
    """At the start of the first task; with momentum 1 its prototypes are the teachers', too."""
    student = make_model(image_size=24).eval()
    method = Mulki(
        MulkiConfig(name="mulki", momentum=1.0),
        student=student,
        teacher=FrozenTeacher(copy.deepcopy(student)),
        classes=CLASSES,
    )
    method.prepare(made_up(dim=DIM))
    batch = random_batch(6)
    batch.inputs["student"] = batch.inputs["teacher"]
    terms = method.terms(batch)
    assert terms["relations"].value.item() == pytest.approx(0, abs=1e-5)
    assert method.measurements["previous_weight"].item() == pytest.approx(0.5)
    torch.testing.assert_close(method.teacher_texts[0], method.teacher_texts[1])


def test_arms_of_the_comparison() -> None:
    batch = batch_of(dtype=torch.float32)
    adaptive, equal, initial, previous = (
        made(**settings)
        for settings in ({}, {"teacher_weights": "equal"}, {"teachers": "initial"}, {"teachers": "previous"})
    )
    values = {}
    for name, method in {"adaptive": adaptive, "equal": equal, "initial": initial, "previous": previous}.items():
        values[name] = float(method.terms(batch)["relations"].value.detach())
    assert values["equal"] == pytest.approx((values["initial"] + values["previous"]) / 2, rel=1e-5)
    assert values["adaptive"] != pytest.approx(values["equal"], rel=1e-6)
    assert initial.previous is None
    assert initial.roles == ("teacher",)
    assert "previous_weight" not in initial.measurements
    assert previous.roles == (PREVIOUS,)


def test_fine_tuning_alone_builds_nothing_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    method = made(prototype_weight=0, relation_weight=0)
    monkeypatch.setattr(method, "encode_teachers", None)
    assert not method.prepares
    assert tuple(method.terms(batch_of(dtype=torch.float32))) == method.term_names == ("labels",)
    aligned = made(relation_weight=0)
    monkeypatch.setattr(aligned, "encode_teachers", None)
    assert tuple(aligned.terms(batch_of(dtype=torch.float32))) == ("labels", "prototypes")
    assert [*aligned.teachers] == [PREVIOUS]  # as which the student's prototypes begin


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, ["teacher", PREVIOUS]),
        ({"teachers": "initial"}, ["teacher"]),
        ({"teachers": "previous"}, [PREVIOUS]),
        ({"relation_weight": 0}, [PREVIOUS]),
        ({"relation_weight": 0, "teachers": "initial"}, [PREVIOUS]),
        ({"relation_weight": 0, "prototype_weight": 0}, []),
    ],
)
def test_teachers_that_no_term_reads_are_left_out(settings: dict[str, Any], asked: list[str]) -> None:
    """So nothing builds a cache of them, and batches bring them no pixels."""
    method = made(**settings)
    assert [*method.teachers] == asked == [*method.roles]
    assert set(make_builder(method).readers) == {"student", *({"teacher"} & set(asked))}
    assert all(term.value.isfinite() for term in method.terms(batch_of(dtype=torch.float32)).values())


def test_prototypes_move_in_training_alone() -> None:
    method, batch = made(), batch_of(dtype=torch.float32)
    before = method.pictures.clone()
    method.eval().terms(batch)
    assert torch.equal(method.pictures, before)
    method.train().terms(batch)
    assert [bool((method.pictures[c] != before[c]).any()) for c in range(5)] == [True, False, False, True, True]


def test_a_momentum_teacher_answers_the_training_data() -> None:
    """The pass asks the model before this task, which reads the student's pictures."""
    method = made()
    assert method.previous is not None
    method.previous.model.load_state_dict(method.student.state_dict())
    found = Answered.joined(survey_of(method, source=MemorySource(12))(PREVIOUS, towers=("image",)))
    assert found.image.shape == (12, DIM)
    assert found.text.shape == (12, 0)
    assert found.labels.tolist() == [-1 if i % 3 == 0 else i % 5 for i in range(12)]


def test_a_resumed_run_ends_with_the_same_bits_and_the_model_before_stays(tmp_path: Path) -> None:
    whole = made()
    assert whole.previous is not None
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    make_trainer(tmp_path / "whole", whole, steps=4, checkpoint_every=2).run()
    make_trainer(tmp_path / "cut", made(), steps=2, checkpoint_every=2).run()
    config = MulkiConfig(name="mulki")
    again = Mulki(config, student=make_model(), teacher=make_teacher(dim=DIM), classes=CLASSES)  # without `prepare`
    make_trainer(tmp_path / "cut", again.train(), steps=4, checkpoint_every=2).run(resume=True)
    ours, theirs = again.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    changed = {key for key in before if not torch.equal(ours[key], before[key])}
    assert "pictures" in changed
    assert {key for key in changed if not key.startswith("student.")} == {"pictures"}
    assert not changed & {f"student.{name}" for name in whole.student.parts["scale"]}


def test_what_does_not_fit_is_refused() -> None:
    config = MulkiConfig(name="mulki")
    with pytest.raises(ConfigError, match=r"test-16 embeds in 16 numbers and its teacher test-24 in 24"):
        Mulki(config, student=make_model(), teacher=make_teacher(), classes=CLASSES)
    with pytest.raises(ConfigError, match="tells classes apart, and the data name one: 'cat'"):
        Mulki(config, student=make_model(), teacher=make_teacher(dim=DIM), classes=ClassPrompts(("cat",), ("{}",)))
    answers = Answered.joined(made_up(dim=DIM)())
    one = replace(answers, labels=torch.where(answers.labels == 3, 3, -1))
    with pytest.raises(ConfigError, match=r"of 5 classes 1 has labelled ones in data\.train"):
        made().prepare(lambda *_, **__: iter([one]))

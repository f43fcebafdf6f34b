"""Hinton's distillation of classes: whose vectors, which labels, and what is saved."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.data.labels import LabelReader
from cmapkd.data.open import open_source
from cmapkd.data.types import Sample
from cmapkd.data.views import View
from cmapkd.diagnosis import diagnose
from cmapkd.methods import StepInfo
from cmapkd.methods.dual import LABELS
from cmapkd.methods.hinton import Hinton
from cmapkd.methods.targets import Answered, Survey
from cmapkd.models import Features, TowerFeatures, load_model
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.texts import LearnedClassVectors, class_vectors
from cmapkd.objectives import kl_divergence
from cmapkd.run import RunConfig
from helpers import CLASSES, make_method, make_model, make_teacher, random_batch

CLASSES_FORM = {"form": "classes", "temperature": 2.0, "task_weight": 0.3, "distill_weight": 0.7}


def logits(embedding: Tensor, vectors: Tensor, scale: Tensor) -> Tensor:
    return scale * F.normalize(embedding, dim=-1) @ vectors.T


@pytest.mark.parametrize("whose", ["own", "teacher"])
def test_terms_are_those_of_the_two_classifiers(whose: str) -> None:
    student, teacher = make_model(), make_teacher()
    settings = {**CLASSES_FORM, "class_vectors": whose, "prompts_at_once": None}
    method = make_method("hinton", student=student, teacher=teacher, settings=settings)
    batch = replace(random_batch(6), extra={LABELS: torch.tensor([4, -1, 0, 0, -1, 2])})
    theirs = class_vectors(teacher.model, CLASSES.names, CLASSES.templates, device="cpu")
    ours = theirs if whose == "teacher" else class_vectors(student, CLASSES.names, CLASSES.templates, device="cpu")
    image = method.student.encode_image(batch.inputs["student"].images).embedding
    mine = logits(image, ours, student.log_logit_scale.exp())
    soft = logits(
        teacher.model.encode_image(batch.inputs["teacher"].images).embedding,
        theirs,
        teacher.model.log_logit_scale.exp(),
    )
    terms = method.terms(batch)
    known = batch.extra[LABELS] >= 0
    assert {name: term.weight for name, term in terms.items()} == {"labels": 0.3, "classes": 0.7}
    expected = F.cross_entropy(mine[known], batch.extra[LABELS][known])
    torch.testing.assert_close(terms["labels"].value, expected, rtol=1e-4, atol=1e-5)
    divergence = kl_divergence(mine, soft, temperature=2.0)
    torch.testing.assert_close(terms["classes"].value, divergence, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whose", ["teacher", "image_means"])
def test_what_learns_beside_the_teachers_texts_gets_a_gradient(whose: str) -> None:
    method = make_method("hinton", settings={**CLASSES_FORM, "class_vectors": whose})
    sum(term.value for term in method.terms(random_batch(6)).values()).backward()
    named = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in named.items() if parameter.grad is None} == set()
    assert "student.image._log_logit_scale" in named
    assert not any(parameter.requires_grad for parameter in method.student.image.text.parameters())


@pytest.mark.parametrize("form", [{}, CLASSES_FORM])
def test_a_weight_of_zero_removes_its_term_and_asks_no_teacher(
    form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make_method("hinton", settings={**form, "prompts_at_once": None, "distill_weight": 0.0})
    monkeypatch.setattr(Hinton, "_encode_teacher", lambda *_: pytest.fail("the teacher was asked"))
    hard = "labels" if form else "contrastive"
    assert alone.term_names == (hard,)
    assert set(alone(random_batch(4))) == {hard}
    monkeypatch.undo()
    soft = make_method("hinton", settings={**form, "task_weight": 0.0})
    assert soft.term_names == ("classes" if form else "similarity",)
    assert set(soft(random_batch(4))) == {*soft.term_names}


def test_labels_without_a_class_are_refused_where_they_are_read() -> None:
    reader = make_method("hinton", settings=CLASSES_FORM).extras[LABELS]
    sample = Sample("x", Image.new("RGB", (8, 8)), label=4)
    assert reader.read(sample, View(), 0) == 4
    with pytest.raises(ValueError, match=r"has label 5, but there are only 5 classes: give the class names"):
        reader.read(replace(sample, label=5), View(), 0)


def test_captions_are_not_read() -> None:
    method = make_method("hinton", settings={**CLASSES_FORM, "prompts_at_once": None})
    batch = random_batch(4)
    other = random_batch(4, seed=1)
    inputs = {role: replace(each, texts=other.inputs[role].texts) for role, each in batch.inputs.items()}
    before, after = method.terms(batch), method.terms(replace(batch, inputs=inputs))
    assert all(torch.equal(before[name].value, after[name].value) for name in before)


def test_prompts_are_drawn_from_the_generator_of_the_step() -> None:
    student = make_model()
    draw = LearnedClassVectors(CLASSES, student, at_once=1)
    every = LearnedClassVectors(CLASSES, student)(student)
    assert torch.allclose(every, class_vectors(student, CLASSES.names, CLASSES.templates, device="cpu"), atol=1e-6)
    first, again = ([draw(student, StepInfo(step).generator("prompts")) for step in range(6)] for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    different = {tuple(one[0].tolist()) for one in first}
    assert len(different) == 2  # as many as there are templates
    with pytest.raises(ValueError, match="1 of 2 templates are to be drawn, but from what"):
        draw(student)


def test_a_share_of_the_labels_is_the_same_samples_every_time() -> None:
    source = open_source("scenes:easy?length=400")
    few, more = LabelReader(0.1), LabelReader(0.3)
    shown = [index for index in range(400) if few.read(source[index], View(), 0) >= 0]
    assert 20 < len(shown) < 65
    assert shown == [index for index in range(400) if few.read(source[index], View(), 7) >= 0]
    assert set(shown) < {index for index in range(400) if more.read(source[index], View(), 0) >= 0}
    assert LabelReader().join([few.read(source[shown[0]], View(), 0), -1]).tolist() == [source[shown[0]].label, -1]


def run_settings(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "teacher": "tiny:scenes-teacher",
        "student": "tiny:small-32",
        "data": {"train": "scenes:easy?length=40", "val": "scenes:easy@val?length=24"},
        "training": {"steps": 3, "batch_size": 8, "checkpoint_every": 1},
        "evaluation": {"tasks": ["zero_shot"]},
        "quiet": True,
    }
    return settings | changes


@pytest.mark.parametrize("cache", [False, True])
def test_a_run_with_the_teachers_vectors_is_saved_with_its_texts(cache: bool, tmp_path: Path) -> None:
    method = {"name": "hinton", "form": "classes", "class_vectors": "teacher"}
    cached = {"cache": {"mode": "auto", "folder": str(tmp_path / "cache")}} if cache else {}
    result = cmapkd.distill(**run_settings(method=method, **cached), out=tmp_path / "run")
    student = load_model(tmp_path / "run")
    assert isinstance(student, JoinedEncoder)
    teacher = cmapkd.load("tiny:scenes-teacher")
    texts = student.tokenizer(["the red circle is the largest object"])
    assert torch.equal(student.encode_text(texts).embedding, teacher.encode_text(texts).embedding)
    assert result.metrics["student"]["zero_shot"]["num_classes"] == 100


@pytest.fixture
def photographs(tmp_path: Path) -> str:
    """Pictures in folders of their classes, without a word about any."""
    draws = random.Random(0)
    for name in ("cat", "dog", "red fox"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (40, 32), tuple(draws.choices(range(256), k=3))).save(
                tmp_path / "train" / name / f"{number}.png"
            )
    return f"folder:{tmp_path / 'train'}"


@pytest.mark.parametrize(
    ("method", "student"),
    [
        ({"name": "hinton", "form": "classes"}, "tiny:small-32"),  # its own texts: a vocabulary of the prompts
        ({"name": "hinton", "form": "classes", "class_vectors": "teacher"}, "tiny:small-32"),
        ({"name": "promptkd"}, "tiny:scenes-teacher"),
    ],
    ids=["own", "teacher", "promptkd"],
)
@pytest.mark.parametrize("cache", ["off", "auto"])
def test_pictures_without_captions_will_do(
    method: dict[str, Any], student: str, cache: str, photographs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = {"train": photographs, "val": photographs}
    settings = run_settings(method=method, student=student, data=data, cache=cache)
    result = cmapkd.distill(**settings, out=tmp_path / "run")
    assert result.metrics["student"]["zero_shot"]["num_classes"] == 3
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3
    assert last["terms/classes"] > 0
    assert not (tmp_path / "run" / "bad_samples.jsonl").read_text()
    student_model = load_model(tmp_path / "run")
    if method.get("class_vectors") is None and method["name"] == "hinton":
        fox, dog = student_model.tokenizer(["a photo of a red fox.", "a photo of a dog."]).ids
        assert not torch.equal(fox, dog)  # the words are in its vocabulary


def test_what_reads_captions_refuses_pictures_without(photographs: str, tmp_path: Path) -> None:
    data = {"train": photographs, "val": photographs}
    with pytest.raises(ConfigError, match=r"none of the 24 samples of folder:.* has a caption, and this use needs"):
        cmapkd.distill(**run_settings(method="hinton", data=data), out=tmp_path / "a")
    settings = run_settings(method={"name": "hinton", "form": "classes"}, data=data, baseline="scratch")
    with pytest.raises(ConfigError, match=r"baseline scratch, which learns from captions: none .* set baseline=none"):
        cmapkd.distill(**settings, out=tmp_path / "b")
    assert not (tmp_path / "b").exists()  # before anything was written or trained


def test_the_doctor_has_nothing_against_pictures_without_captions(photographs: str) -> None:
    def problems(method: Any) -> list[str]:
        settings = run_settings(method=method, data={"train": photographs})
        del settings["quiet"]
        findings = diagnose(RunConfig.from_mapping(settings))
        return [finding.what for finding in findings if finding.level == "problem"]

    assert problems({"name": "hinton", "form": "classes"}) == []
    assert problems("hinton") == ["data.train"]


def test_a_source_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{name}.png,a cat\n" for name in range(8)))
    for name in range(8):
        (tmp_path / f"{name}.png").write_bytes(b"")
    data = {"train": f"csv:{tmp_path / 'pairs.csv'}"}
    with pytest.raises(ConfigError, match="reads the names of the classes"):
        cmapkd.distill(**run_settings(method={"name": "hinton", "form": "classes"}, data=data), out=tmp_path / "run")


def test_only_the_towers_that_are_read_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make_method("hinton", settings={"form": "classes", "class_vectors": "teacher"})
    assert method.teacher is not None

    def never(*_: Any) -> Any:
        raise AssertionError("nobody reads the texts")

    monkeypatch.setattr(method.teacher.model, "encode_text", never)
    monkeypatch.setattr(method.student, "encode_text", never)
    batch = random_batch(4)
    assert method.encode_student(batch).text.embedding.shape == (4, 0)
    assert method.encode_teacher(batch).text.embedding.shape == (4, 0)
    method(batch)


# ------------------------------------------------------------------------------------------------ means of images

IMAGE_MEANS = {"form": "classes", "class_vectors": "image_means"}


def answered(images: Tensor, labels: list[int]) -> Survey:
    """A survey with these answers, in two parts."""

    def survey(role: str = "teacher", *, num: int | None = None, towers: Any = None) -> Any:
        assert (role, num, towers) == ("teacher", None, ("image",))
        keys = torch.arange(len(labels))
        for part in (slice(0, 3), slice(3, None)):
            yield Answered(images[part], images[part, :0], keys[part], torch.tensor(labels)[part])

    return survey


def named_embed_kd() -> dict[str, Any]:
    """The settings that docs/methods.md gives for CLIP-Embed-KD."""
    page = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| CLIP-Embed-KD"))
    settings: dict[str, Any] = yaml.safe_load("{" + row.split("`{")[1].split("}`")[0] + "}")
    return settings


def test_embed_kds_loss_is_the_labels_term_at_a_scale_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    published = json.loads((Path(__file__).parent / "fixtures/clip_embed_kd.json").read_text())
    settings = named_embed_kd()
    assert settings.pop("name") == "hinton"
    student, means, gradient = (
        torch.tensor(published[name], dtype=torch.float64) for name in ("student", "centroids", "gradient")
    )
    method = make_method("hinton", settings=settings).double()
    method.class_vectors = F.normalize(means, dim=-1)
    student.requires_grad_()
    features = Features(TowerFeatures(student), TowerFeatures(student[:, :0]), torch.tensor(1.0))
    monkeypatch.setattr(method, "encode_student", lambda _: features)
    batch = replace(random_batch(4), extra={LABELS: torch.tensor(published["labels"])})
    terms = method.terms(batch)
    assert tuple(terms) == ("labels",)  # the teacher is asked before the first step alone
    assert terms["labels"].value.item() == pytest.approx(published["value"], rel=1e-12)
    (found,) = torch.autograd.grad(terms["labels"].value, student)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_class_vectors_are_the_means_of_labelled_images() -> None:
    images, labels = torch.randn(9, 24), [0, 1, 4, 2, -1, 3, 0, 2, 0]
    method = make_method("hinton", settings=IMAGE_MEANS)
    assert method.class_vectors.isfinite().all()  # of answers that are made up
    method.prepare(answered(images, labels))
    units = F.normalize(images, dim=-1)
    for label in range(5):
        own = torch.stack([unit for unit, of in zip(units, labels, strict=True) if of == label])
        torch.testing.assert_close(method.class_vectors[label], F.normalize(own.mean(0), dim=0))
    batch = random_batch(6)
    terms = method.terms(batch)
    vectors, teacher = method.class_vectors, method.encode_teacher(batch)
    mine = logits(method.encode_student(batch).image.embedding, vectors, method.student.log_logit_scale.exp())
    divergence = kl_divergence(mine, logits(teacher.image.embedding, vectors, teacher.logit_scale), temperature=1.0)
    torch.testing.assert_close(terms["classes"].value, divergence, rtol=1e-4, atol=1e-5)


def test_a_class_without_images_keeps_its_prompts() -> None:
    teacher = make_teacher()
    method = make_method("hinton", teacher=teacher, settings={**IMAGE_MEANS, "task_weight": 0})
    assert LABELS in method.extras  # the means are of labelled images, whatever the terms read
    method = make_method("hinton", teacher=teacher, settings={**IMAGE_MEANS, "label_share": 0.5})
    fresh = Hinton(method.config, student=make_model(), teacher=teacher, classes=CLASSES)
    prompts = class_vectors(teacher.model, CLASSES.names, CLASSES.templates, device="cpu")
    images = torch.randn(4, 24)
    fresh.prepare(answered(images, [1, 2, 3, -1]))
    torch.testing.assert_close(fresh.class_vectors[[0, 4]], prompts[[0, 4]])
    torch.testing.assert_close(fresh.class_vectors[[1, 2, 3]], F.normalize(images[:3], dim=-1))
    with pytest.raises(
        ConfigError, match=r"means of labelled training images, and no label is read: take a data\.train"
    ):
        method.prepare(answered(images, [-1] * 4))

"""ZSCL: its terms against the published functions and the formulas, and how it is put together."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.autograd import gradcheck

from cmapkd.config import ConfigError
from cmapkd.data.templates import ClassPrompts
from cmapkd.features.weights import Anchor
from cmapkd.methods import StepInfo, build_method
from cmapkd.methods.dual import LABELS
from cmapkd.methods.zscl import ZSCL, ZSCLConfig
from cmapkd.models import FrozenTeacher
from cmapkd.models.average import RunningMean
from cmapkd.objectives import labelled_cross_entropy, reference_divergences, similarities
from cmapkd.run import RunConfig, check_training, classes_of, open_training
from helpers import CLASSES, make_method, make_model, make_teacher, make_trainer, random_batch

# Numbers of functions of the authors' repository; the file names commit and conditions.
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "zscl.json").read_text())
SENTENCES = ("a red cat", "a blue boat near a house", "green tree", "a round dog under a tree", "two cats")


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def zscl(**settings: Any) -> ZSCL:
    """Whose teacher has the student's width and not its weights, so that nothing is zero."""
    student, teacher = make_model(), FrozenTeacher(make_model(image_size=24, seed=9))
    torch.manual_seed(3)
    config = ZSCLConfig.from_mapping({"name": "zscl", **settings})
    classes = replace(CLASSES, sentences=SENTENCES)
    method = build_method(config, student=student, teacher=teacher, classes=classes).double().train()
    teacher.model.double()
    assert isinstance(method, ZSCL)
    return method


def batch_of(size: int = 6, seed: int = 0) -> Any:
    return random_batch(size, seed=seed, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ published code


@pytest.mark.parametrize("case", PUBLISHED["distillation"], ids=["T=2", "T=1.5"])
def test_the_divergences_are_the_published_cross_entropies(case: dict[str, Any]) -> None:
    """Up to the teacher's entropy, which the fixture has beside the value."""
    student = tensor(case["student"]).requires_grad_()
    logits = [
        similarities(x, tensor(case["sentences"]), case["logit_scale"]) for x in (student, tensor(case["teacher"]))
    ]
    found = reference_divergences(*logits, torch.ones(len(student), dtype=torch.bool), temperature=case["temperature"])
    for value, name in zip(found, ("reference_image", "reference_text"), strict=True):
        expected = case["expected"][name]
        assert value.item() + expected["entropy"] == pytest.approx(expected["value"], rel=1e-9)
        (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
        torch.testing.assert_close(gradient, tensor(expected["gradient"]), rtol=1e-9, atol=1e-11)


def test_the_task_loss_is_the_published_one() -> None:
    case = PUBLISHED["cross_entropy"]
    logits = tensor([*case["logits"], [9.0] * 5]).requires_grad_()  # one without a label
    value = labelled_cross_entropy(logits, torch.tensor([*case["labels"], -1]), smoothing=case["smoothing"])
    assert value.item() == pytest.approx(case["value"], rel=1e-12)
    value.backward()
    torch.testing.assert_close(logits.grad, tensor([*case["gradient"], [0.0] * 5]), rtol=1e-10, atol=1e-12)


def with_weights(weights: list[Any]) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    for parameter, values in zip(model.parameters(), weights, strict=True):
        parameter.data = tensor(values)
    return model


def test_the_anchor_is_the_published_l2_loss() -> None:
    case = PUBLISHED["l2_loss"]
    anchor, model = Anchor(with_weights(case["start"])), with_weights(case["model"])
    value = anchor.distance(model)
    assert value.item() == pytest.approx(case["value"], rel=1e-12)
    value.backward()
    for parameter, gradient in zip(model.parameters(), case["gradients"], strict=True):
        torch.testing.assert_close(parameter.grad, tensor(gradient), rtol=1e-12, atol=1e-14)


def test_the_mean_is_the_published_one() -> None:
    case = PUBLISHED["merge_we"]
    mean = RunningMean(with_weights(case["start"]), every=1)
    for number, step in enumerate(case["steps"]):
        mean.update(with_weights(step["model"]), number)
        for parameter, values in zip(mean.module.parameters(), step["mean"], strict=True):
            torch.testing.assert_close(parameter.data, tensor(values), rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------ formulas


def written_out(ours: Tensor, theirs: Tensor, temperature: float) -> float:
    """Mean over rows of T² KL(σ(theirs/T) ‖ σ(ours/T)), in loops."""
    total = 0.0
    for mine, other in zip((ours / temperature).tolist(), (theirs / temperature).tolist(), strict=True):
        q, p = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (mine, other))
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    return total / len(ours) * temperature**2


def test_divergences_leave_other_pictures_out() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 6, 4, dtype=torch.float64)
    counts = torch.tensor([True, False, True, True, False, False])
    image, text = reference_divergences(ours, theirs, counts, temperature=2.0)
    assert image.item() == pytest.approx(written_out(ours[counts], theirs[counts], 2.0), rel=1e-10)
    assert text.item() == pytest.approx(written_out(ours[counts].T, theirs[counts].T, 2.0), rel=1e-10)
    assert gradcheck(lambda x: reference_divergences(x, theirs, counts, temperature=2.0), ours.requires_grad_())
    agreeing = reference_divergences(theirs, theirs, counts)
    assert max(map(abs, (value.item() for value in agreeing))) < 1e-12
    nothing = reference_divergences(ours, theirs, torch.zeros(6, dtype=torch.bool))
    assert [value.item() for value in nothing] == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(sum(nothing), ours)
    assert not gradient.any()
    with pytest.raises(ValueError, match=r"counts \(5,\): expected the same pictures"):
        reference_divergences(ours, theirs, counts[1:])


@pytest.mark.parametrize("text_side", ["teacher", "own"])
def test_terms_are_the_formulas(text_side: str) -> None:
    method = zscl(text_side=text_side, sentences_at_once=3, prompts_at_once=None, temperature=1.5)
    with torch.no_grad():
        [*method.student.parameters()][-1].add_(0.01)
    batch, info = batch_of(), StepInfo(step=4)
    terms = method(batch, info)
    assert tuple(terms) == method.term_names == ("labels", "reference_image", "reference_text", "anchor")
    student, teacher = method.encode_student(batch), method.encode_teacher(batch)
    v, v_T = (F.normalize(features.image.embedding, dim=-1) for features in (student, teacher))
    scale = float(student.logit_scale)

    prompts = method.student.encode_text(method.student.tokenizer(CLASSES.texts)).embedding
    W = F.normalize(F.normalize(prompts, dim=-1).view(5, 2, -1).mean(1), dim=-1)
    labels = batch.extra[LABELS]
    smooth = 0.8 * F.one_hot(labels.clamp_min(0), 5).double() + 0.2 / 5
    losses = -(smooth * (scale * v @ W.T).log_softmax(1)).sum(1)
    assert terms["labels"].value.item() == pytest.approx(losses[labels >= 0].mean().item(), rel=1e-9)

    R = F.normalize(method.teacher.model.encode_text(method.student.tokenizer(SENTENCES)).embedding, dim=-1)
    ours = R
    if text_side == "own":
        drawn = torch.randperm(5, generator=info.generator("sentences"))[:3]
        ours = F.normalize(method.student.encode_text(method.student.tokenizer(SENTENCES)).embedding, dim=-1)[drawn]
        R = R[drawn]
    rows = torch.tensor([name == "reference" for name in batch.streams])
    z, z_T = scale * v[rows] @ ours.T, scale * v_T[rows] @ R.T
    assert terms["reference_image"].value.item() == pytest.approx(written_out(z, z_T, 1.5), rel=1e-6)
    assert terms["reference_text"].value.item() == pytest.approx(written_out(z.T, z_T.T, 1.5), rel=1e-6)
    moved = [*method.student.parameters()][-1]
    assert terms["anchor"].value.item() == pytest.approx(1e-4 * moved.numel(), rel=1e-9)

    text_gradient = torch.autograd.grad(
        terms["reference_image"].value, [*method.student.text.parameters()], allow_unused=True, retain_graph=True
    )
    assert any(gradient is not None for gradient in text_gradient) == (text_side == "own")


# ------------------------------------------------------------------------------------------------ put together


def test_a_weight_of_zero_computes_nothing() -> None:
    method = zscl(image_weight=0, text_weight=0, anchor_weight=0)
    assert method.term_names == ("labels",)
    assert method.streams == ()
    assert method.anchor is None
    assert not hasattr(method, "sentence_vectors")
    assert LABELS not in zscl(task_weight=0).extras
    assert zscl().streams == ("reference",)
    assert zscl(reference="train").streams == ()


def test_the_scale_is_frozen_and_the_rest_learns(tmp_path: Path) -> None:
    def trainer() -> Any:
        torch.manual_seed(1)
        teacher = FrozenTeacher(make_model(image_size=24, seed=9))
        method = make_method("zscl", student=make_model(), teacher=teacher)
        return make_trainer(tmp_path, method, steps=4, checkpoint_every=2, mean_every=2)

    whole = trainer()
    before = {name: value.clone() for name, value in whole.method.student.state_dict().items()}
    whole.run()
    after = whole.method.student.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == ["_log_logit_scale"]
    (tmp_path / "checkpoints" / "step-000000004").rename(tmp_path / "last")
    again = trainer()
    again.run(resume=True)
    assert again.method.anchor.distance(whole.method.student) > 0
    for name, value in whole.method.state_dict().items():
        assert torch.equal(again.method.state_dict()[name], value), name
    name = [*before][-1]
    assert not torch.equal(again.student.state_dict()[name], after[name])  # the mean is what is saved


def test_models_and_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="test-16 embeds in 16 numbers and its teacher test-24 in 24: take teacher: stu"
    ):
        make_method("zscl", teacher=make_teacher())
    teacher = FrozenTeacher(make_model(image_size=24))
    with pytest.raises(
        ConfigError, match=r"compares pictures with 2 sentences or more, and method\.sentences=captions g"
    ):
        make_method("zscl", teacher=teacher, settings={"sentences": "captions"})
    with pytest.raises(ConfigError, match="terms read stream 'reference', and these batches are of one stream"):
        zscl()(replace(batch_of(), streams=()), StepInfo())
    stages: Any = ()
    assert zscl().why_whole(stages) is not None
    assert zscl(anchor_weight=0).why_whole(stages) is None


def config(**data: Any) -> RunConfig:
    values = {
        "teacher": "student",
        "student": "tiny:scenes-teacher",
        "data": {"train": "scenes?length=40&label=count", **data},
        "method": {"name": "zscl", "num_sentences": 7},
        "training": {"steps": 2, "batch_size": 16},
    }
    return RunConfig.from_mapping(values)


def test_sentences_are_captions_of_the_reference_stream(tmp_path: Path) -> None:
    stream = {"source": "scenes?start=90&length=30", "share": 0.5, "labels": "hidden"}
    made = config(more={"reference": stream})
    source = open_training(made)
    classes = classes_of(made, source)
    assert isinstance(classes, ClassPrompts)
    assert classes.names[2] == "three objects"
    assert classes.sentences == tuple(source.captions(40 + place)[0] for place in range(0, 28, 4))
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\n")
    lines = made.model_copy(
        update={"method": made.method.model_copy(update={"sentences": str(tmp_path / "lines.txt")})}
    )
    assert classes_of(lines, source).sentences == ("one", "two", "three")
    missing = made.model_copy(update={"method": made.method.model_copy(update={"sentences": "captionz"})})
    with pytest.raises(ConfigError, match=r"sentences: 'captionz' is no file and none of captions, classes"):
        classes_of(missing, source)


def test_data_without_labels_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(f'{{"image": "{n}.png", "caption": "a"}}\n' for n in range(20)))
    unlabelled = config(train=f"jsonl:{tmp_path}/pairs.jsonl")
    for number in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    with pytest.raises(
        ConfigError,
        match=r"zscl, as it is set, learns from labels, and .* has none.* or set method\.task_weight=0$",
    ):
        check_training(unlabelled, zscl(), open_training(unlabelled))
    always = make_method("mulki", settings={"task_weight": 0.0})  # its prototypes are of labels, too
    with pytest.raises(ConfigError, match=r"take a data\.train with labels$"):
        check_training(unlabelled, always, open_training(unlabelled))


def test_a_missing_stream_is_told_before_the_first_step() -> None:
    alone = config()
    with pytest.raises(
        ConfigError, match=r"zscl reads stream 'reference', and the data have train: name it in data\.mo"
    ):
        check_training(alone, zscl(), open_training(alone))

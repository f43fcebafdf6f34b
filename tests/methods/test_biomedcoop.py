"""BiomedCoOp against the published forward pass; its bank, its filter, CoOp, what is saved and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.autograd import gradcheck

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.templates import ClassPrompts
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.run import evaluate
from cmapkd.methods.biomedcoop import BiomedCoOp, BiomedCoOpConfig
from cmapkd.methods.dual import LABELS
from cmapkd.models import Features, TowerFeatures, load_model
from cmapkd.models.prompted import PromptedEncoder
from cmapkd.models.texts import class_vectors
from cmapkd.models.tiny import TinyDualEncoder
from cmapkd.objectives import kl_divergence, similarities
from cmapkd.objectives.prompt_bank import kept_class_vectors, kept_prompts, prompt_scores
from helpers import CLASSES, make_method, make_model, make_teacher, make_trainer, random_batch

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "biomedcoop.json").read_text())
TERMS = ("labels", "texts", "classes")


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def made(**settings: Any) -> BiomedCoOp:
    method = make_method("biomedcoop", settings=settings)
    assert isinstance(method, BiomedCoOp)
    return method.train()


# ------------------------------------------------------------------------------------------------ published code


@pytest.mark.parametrize("number", range(len(PUBLISHED["cases"])))
def test_terms_and_gradients_are_the_published_ones(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PUBLISHED["cases"][number]
    weights = {key: case[key] for key in ("threshold", "text_weight", "distill_weight")}
    method = made(selection="batch", **weights)
    texts, bank = tensor(case["texts"]).requires_grad_(), F.normalize(tensor(case["bank"]), dim=-1)
    method.bank, method.in_bank = bank, torch.ones(bank.shape[:2], dtype=torch.bool)
    method.own_vectors = F.normalize(bank.mean(1), dim=-1)
    image = TowerFeatures(tensor(case["images"]))
    features = Features(image, TowerFeatures(tensor(case["images"])), tensor(case["log_logit_scale"]).exp())
    monkeypatch.setattr(method, "encode_student", lambda _batch: features)
    monkeypatch.setattr(method, "encode_teacher", lambda _batch: features)
    monkeypatch.setattr(method, "vectors", lambda _model: F.normalize(texts, dim=-1))
    terms = method.terms(with_labels(case["labels"]))
    kept = kept_prompts(prompt_scores(image.embedding, bank, method.in_bank), case["threshold"])
    assert kept.tolist() == case["kept"]
    for name in TERMS:
        value = terms[name].weight * terms[name].value
        assert value.item() == pytest.approx(case["values"][name], rel=1e-10), name
        (gradient,) = torch.autograd.grad(value, texts, retain_graph=True)
        torch.testing.assert_close(gradient, tensor(case["gradients"][name]), rtol=1e-9, atol=1e-11, msg=name)


def with_labels(labels: list[int]) -> Any:
    batch = random_batch(len(labels))
    batch.extra[LABELS] = torch.tensor(labels)
    return batch


def test_gradients_reach_the_vectors() -> None:
    torch.manual_seed(0)
    images, texts, soft = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 6), (4, 6), (3, 4)))

    def loss(w: Tensor) -> Tensor:
        unit = F.normalize(w, dim=-1)
        logits = similarities(images, unit, 2.0)
        return kl_divergence(logits, soft, temperature=1.0) + F.mse_loss(unit, F.normalize(texts.flip(0), dim=-1))

    assert gradcheck(loss, texts.requires_grad_())


# ------------------------------------------------------------------------------------------------ the bank's filter


def test_scores_and_vectors_are_the_loops() -> None:
    torch.manual_seed(0)
    images, bank = torch.randn(4, 6), F.normalize(torch.randn(3, 5, 6), dim=-1)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    units = F.normalize(images, dim=-1)
    expected = [
        sum(max(float(units[b] @ bank[c, p]) for c in range(3) if mask[c, p]) for b in range(4)) / 4 for p in range(5)
    ]
    torch.testing.assert_close(prompt_scores(images, bank, mask), torch.tensor(expected))
    kept = torch.tensor([True, False, False, True, False])
    found = kept_class_vectors(bank, mask, kept)
    torch.testing.assert_close(found[0], F.normalize(bank[0, [0, 3]].mean(0), dim=0))
    torch.testing.assert_close(found[1], bank[1, 0])
    none_of_its_own = kept_class_vectors(bank, mask, torch.tensor([False, False, False, True, True]))[1]
    torch.testing.assert_close(none_of_its_own, F.normalize(bank[1, :3].mean(0), dim=0))


def test_the_filter_is_a_plain_score_because_median_and_deviation_cancel() -> None:
    scores = torch.randn(20, dtype=torch.float64)
    median = scores.median()
    robust = (scores - median) / (scores - median).abs().median()
    published = ((robust - robust.mean()) / robust.std()).abs() <= 1.2
    assert kept_prompts(scores, 1.2).tolist() == published.tolist()
    assert 0 < published.sum() < 20


def test_scores_that_tell_nothing_apart_keep_every_prompt_and_no_threshold_drops_all() -> None:
    assert kept_prompts(torch.full((6,), 0.3), 1.5).all()
    assert kept_prompts(torch.tensor([0.3]), 0.1).all()
    assert kept_prompts(torch.tensor([0.1, 0.2, 0.9]), 1e-3).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="the threshold is 0"):
        kept_prompts(torch.zeros(3), 0)
    with pytest.raises(ValueError, match=r"images has shape \(2, 3\), bank \(4, 5, 6\)"):
        prompt_scores(torch.zeros(2, 3), torch.zeros(4, 5, 6), torch.ones(4, 5, dtype=torch.bool))


def test_a_template_that_fits_no_picture_is_left_out_and_a_wrong_prompt_of_one_class_is_not() -> None:
    """What the filter can see: it scores a template by the nearest class, whichever that is."""
    torch.manual_seed(0)
    classes = F.normalize(torch.randn(10, 32), dim=-1)
    pictures = classes.repeat(4, 1) + 0.1 * torch.randn(40, 32)
    bank = F.normalize(classes[:, None] + 0.1 * torch.randn(10, 12, 32), dim=-1)
    mask = torch.ones(10, 12, dtype=torch.bool)
    swapped = bank.clone()
    swapped[[0, 1], 3] = bank[[1, 0], 3]  # one template names two classes the wrong way round
    alien = bank.clone()
    alien[:, 3] = F.normalize(torch.randn(10, 32), dim=-1)
    assert not kept_prompts(prompt_scores(pictures, alien, mask), 2.0)[3]
    torch.testing.assert_close(prompt_scores(pictures, swapped, mask), prompt_scores(pictures, bank, mask))


def test_running_scores_are_those_of_all_pictures_so_far() -> None:
    method, batches = made(), [random_batch(size, seed=size) for size in (3, 8, 5)]
    for batch in batches:
        method.terms(batch)
    pictures = torch.cat([method.encode_teacher(batch).image.embedding for batch in batches])
    torch.testing.assert_close(method.scores, prompt_scores(pictures, method.bank, method.in_bank))
    assert method.seen == 16
    method.eval().terms(batches[0])
    assert method.seen == 16


# ------------------------------------------------------------------------------------------------ the method


def test_terms_are_the_formula() -> None:
    method, batch = made(text_weight=3.0, distill_weight=5.0, threshold=0.9), random_batch(6)
    terms = method.terms(batch)
    assert {name: term.weight for name, term in terms.items()} == {"labels": 1.0, "texts": 3.0, "classes": 5.0}
    student, teacher = make_model().eval(), make_teacher().model
    words = [f"red blue {name}." for name in CLASSES.names]  # the context begins as "red blue"
    w = F.normalize(student.encode_text(student.tokenizer(words)).embedding, dim=-1)
    v = F.normalize(student.encode_image(batch.inputs["student"].images).embedding, dim=-1)
    z = student.log_logit_scale.exp() * v @ w.T
    labels = batch.extra[LABELS]
    torch.testing.assert_close(terms["labels"].value, F.cross_entropy(z[labels >= 0], labels[labels >= 0]))
    own = class_vectors(student, CLASSES.names, CLASSES.templates, device="cpu")
    torch.testing.assert_close(terms["texts"].value, (w - own).square().mean())
    u = F.normalize(teacher.encode_image(batch.inputs["teacher"].images).embedding, dim=-1)
    kept = kept_prompts(prompt_scores(u, method.bank, method.in_bank), 0.9)
    soft = teacher.log_logit_scale.exp() * u @ F.normalize(method.bank[:, kept].mean(1), dim=-1).T
    expected = F.kl_div(z.log_softmax(1), soft.log_softmax(1), reduction="sum", log_target=True) / z.numel()
    torch.testing.assert_close(terms["classes"].value, expected)
    assert method.measurements["kept_prompts"] == kept.sum()


def test_without_its_two_terms_it_is_coop_and_asks_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = made(text_weight=0, distill_weight=0), random_batch(6)
    monkeypatch.setattr(method, "encode_teacher", None)
    terms = method.terms(batch)
    assert tuple(terms) == method.term_names == ("labels",)
    assert {name for name, _ in method.named_buffers() if not name.startswith("student.")} == set()
    full = made().terms(batch)["labels"]
    for value in (terms["labels"].value, full.value):
        torch.testing.assert_close(value, full.value)
    terms["labels"].value.backward()
    assert method.student.context.tokens.grad.abs().amax() > 0  # type: ignore[union-attr]


def test_only_the_context_learns_and_the_rest_keeps_every_bit(tmp_path: Path) -> None:
    method = made()
    with torch.no_grad():
        method.student.log_logit_scale.fill_(5.0)  # beyond what CLIP would clamp
    before = {key: value.clone() for key, value in method.state_dict().items()}
    assert [name for name, p in method.named_parameters() if p.requires_grad] == ["student.context.tokens"]
    make_trainer(tmp_path, method, steps=3).run()
    assert not method.student.model.training
    changed = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"student.context.tokens", "scores", "seen"}


def test_a_student_that_is_its_teacher_agrees_with_its_own_prompt() -> None:
    """Where the learned context and the bank say the same words, nothing is left to distil."""
    model = make_model(dim=24, image_size=24)
    method = BiomedCoOp(
        BiomedCoOpConfig(name="biomedcoop", context="red blue", template="{}"),
        student=model,
        teacher=make_teacher(dim=24, seed=0),
        classes=ClassPrompts(CLASSES.names, ("red blue {}",)),
    )
    batch = random_batch(4)
    batch.inputs["student"] = batch.inputs["teacher"]
    terms = method.terms(batch)
    assert terms["texts"].value.item() == pytest.approx(0, abs=1e-10)
    assert terms["classes"].value.item() == pytest.approx(0, abs=1e-6)


def test_settings_and_models_that_do_not_fit_are_refused() -> None:
    class Unreached(TinyDualEncoder):
        token_embedding = None  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="biomedcoop: the text tower of test-16 takes no learned vectors"):
        make_method("biomedcoop", student=make_model(kind=Unreached))
    with pytest.raises(ConfigError, match=r"the context 'red red red.*give 1 to 8"):
        made(context="red " * 9)
    with pytest.raises(ConfigError, match="the context 0 is 0 tokens"):
        made(context=0)
    with pytest.raises(ConfigError, match=r"template: .*there must be \{\} where the name of a class goes"):
        made(template="a photo")
    config = BiomedCoOpConfig(name="biomedcoop", context=2)
    with pytest.raises(ConfigError, match="tells classes apart, and the data name one: 'cat'"):
        BiomedCoOp(config, student=make_model(), teacher=make_teacher(), classes=ClassPrompts(("cat",), ("{}",)))


def test_data_without_labels_are_refused_before_the_first_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,a red circle\nb.png,a blue ring\n")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(ConfigError, match=r"learns from labels, and .* has none: take a data\.train with labels$"):
        cmapkd.distill(
            recipe="biomedcoop_scenes",
            data={"train": f"csv:{tmp_path / 'pairs.csv'}", "val": None, "test": None},
            evaluation={"class_names": str(tmp_path / "names.txt")},
            training={"steps": 1, "batch_size": 2},
            quiet=True,
            out=tmp_path / "run",
        )


def test_a_run_saves_a_model_that_is_scored_on_classes_it_never_saw(tmp_path: Path) -> None:
    run = cmapkd.distill(
        recipe="biomedcoop_scenes",
        data={"train": "scenes:easy?length=40", "val": "scenes:easy@val?length=30", "test": None},
        training={"steps": 3, "batch_size": 8, "log_every": 1},
        quiet=True,
        out=tmp_path / "run",
    )
    student = load_model(tmp_path / "run")
    assert isinstance(student, PromptedEncoder)
    config = EvaluationConfig(tasks=("zero_shot",))
    again, novel = (
        evaluate(student, open_source(name), config, device="cpu")["zero_shot"]
        for name in ("scenes:easy@val?length=30", "scenes@ood?length=30")
    )
    assert again == run.metrics["student"]["zero_shot"]
    assert novel["num_classes"] > 1

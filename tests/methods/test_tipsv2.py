"""Patch-level distillation: the divergence and the prototypes by hand, masks, what is kept, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.config import ConfigError
from cmapkd.features.closed_form import spherical_kmeans
from cmapkd.features.pyramid import level_grid
from cmapkd.methods import StepInfo
from cmapkd.methods.tipsv2 import TIPSv2
from cmapkd.models.tiny import TinyDualEncoder
from cmapkd.objectives import contrastive_loss, feature_distance
from cmapkd.objectives.prototypes import prototype_divergence
from cmapkd.training.checkpoint import list_checkpoints, read_checkpoint
from helpers import make_method, make_model, make_teacher, make_trainer, random_batch

TERMS = ("contrastive", "feature", "patches")


def made(**settings: Any) -> TIPSv2:
    method = make_method("tipsv2", settings=settings)
    assert isinstance(method, TIPSv2)
    return method.train()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


# ------------------------------------------------------------------------------------------------ the divergence


@pytest.mark.parametrize("masked", [False, True])
def test_the_divergence_is_the_loop(masked: bool) -> None:
    student, teacher, centres = tokens(2, 3, 5), tokens(2, 3, 5).flip(1), F.normalize(tokens(4, 5), dim=-1)
    counted = torch.tensor([[True, False, True], [False, False, True]]) if masked else None
    found = prototype_divergence(
        student, teacher, centres, student_temperature=0.1, teacher_temperature=0.07, counted=counted
    )
    for b in range(2):
        cells = [i for i in range(3) if counted is None or counted[b, i]]
        total = 0.0
        for i in cells:
            p = (F.normalize(teacher[b, i], dim=0) @ centres.T / 0.07).softmax(0)
            q = (F.normalize(student[b, i], dim=0) @ centres.T / 0.1).softmax(0)
            total += float((p * (p / q).log()).sum())
        assert float(found[b]) == pytest.approx(total / len(cells))


def test_the_gradient_is_that_of_the_published_cross_entropy_and_reaches_the_student_alone() -> None:
    student, teacher, centres = (
        tokens(2, 3, 5).requires_grad_(),
        tokens(3, 2, 5).transpose(0, 1).requires_grad_(),
        F.normalize(tokens(4, 5), dim=-1),
    )

    def loss(s: Tensor) -> Tensor:
        return prototype_divergence(s, teacher, centres, student_temperature=0.5, teacher_temperature=0.4).mean()

    assert gradcheck(loss, student)
    ours, theirs = torch.autograd.grad(loss(student), (student, teacher), allow_unused=True)
    assert theirs is None
    p = (F.normalize(teacher, dim=-1) @ centres.T / 0.4).softmax(-1).detach()
    entropy = -(p * (F.normalize(student, dim=-1) @ centres.T / 0.5).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(ours, torch.autograd.grad(entropy, student)[0])


def test_equal_tokens_at_equal_temperatures_have_no_divergence() -> None:
    x, centres = tokens(2, 3, 5), F.normalize(tokens(4, 5), dim=-1)
    same = prototype_divergence(x, 3 * x, centres, student_temperature=0.1, teacher_temperature=0.1)
    torch.testing.assert_close(same, torch.zeros_like(same))
    other = prototype_divergence(x, x.flip(0), centres, student_temperature=0.1, teacher_temperature=0.1)
    assert (other > 0).all()
    with pytest.raises(ValueError, match=r"student has shape \(2, 3, 5\), teacher \(2, 2, 5\)"):
        prototype_divergence(x, x[:, :2], centres, student_temperature=0.1, teacher_temperature=0.1)


# ------------------------------------------------------------------------------------------------ the prototypes


def test_prototypes_find_directions_that_are_there() -> None:
    truth = F.normalize(tokens(3, 8), dim=-1)
    cloud = (truth[:, None] + 0.05 * tokens(3, 40, 8)).flatten(0, 1) * torch.arange(1, 121)[:, None]
    best = max(
        float((spherical_kmeans(cloud, 3, torch.Generator().manual_seed(seed)) @ truth.T).amax(1).min())
        for seed in range(5)
    )
    assert best > 0.99
    one = spherical_kmeans(cloud, 1, torch.Generator())
    torch.testing.assert_close(one[0], F.normalize(F.normalize(cloud, dim=-1).mean(0), dim=0))


def test_prototypes_are_a_function_of_tokens_and_draws() -> None:
    cloud = tokens(50, 6)
    one, again = (spherical_kmeans(cloud, 50, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one, again)
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(50, dtype=torch.float64))
    with pytest.raises(ValueError, match="51 clusters are asked for, and there are 50 rows"):
        spherical_kmeans(cloud, 51, torch.Generator())


# ------------------------------------------------------------------------------------------------ the method


def test_terms_are_the_formulas() -> None:
    method, batch = made(), random_batch(6)
    terms = method(batch, StepInfo(seed=3))
    assert {name: term.weight for name, term in terms.items()} == dict(zip(TERMS, (1.0, 2000 / 512, 1.0), strict=True))
    student, teacher = method.student, method.teacher.model  # type: ignore[union-attr]
    pixels = {role: batch.inputs[role].images for role in ("student", "teacher")}
    ours = student.encode_image(pixels["student"], ("blocks.0",))
    theirs = teacher.encode_image(pixels["teacher"], ("blocks.0",))
    assert method.map_tokens is not None
    mapped = method.map_tokens(ours.levels["blocks.0"].values[:, 1:])
    at_grid = level_grid(theirs.levels["blocks.0"], (2, 2))  # of 3 x 3 cells
    draws = StepInfo(seed=3).generator("prototypes")
    every = level_grid(theirs.levels["blocks.0"]).flatten(0, 1)
    some = torch.randperm(len(every), generator=draws)
    torch.testing.assert_close(method.centres, spherical_kmeans(every[some], 6, draws))
    expected = prototype_divergence(
        mapped, at_grid, method.centres, student_temperature=0.1, teacher_temperature=0.07
    ).mean()
    torch.testing.assert_close(terms["patches"].value, expected)
    texts = [model.encode_text(batch.inputs["student"].texts).embedding for model in (student, teacher)]
    scale = student.log_logit_scale.exp()
    plain = contrastive_loss(ours.embedding, texts[0], logit_scale=scale)
    torch.testing.assert_close(terms["contrastive"].value, plain)
    assert method.project is not None
    distance = feature_distance(method.project.image(ours.embedding), theirs.embedding)
    distance = distance + feature_distance(method.project.text(texts[0]), texts[1])
    torch.testing.assert_close(terms["feature"].value, distance)


def test_prototypes_are_found_once_and_kept_by_a_checkpoint(tmp_path: Path) -> None:
    trained = make_trainer(tmp_path, made(), steps=3, checkpoint_every=3)
    trained.run()
    tensors, progress = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert tensors["method"]["centres"].norm(dim=-1).allclose(torch.ones(6))
    assert progress.structure == {"found": True}
    method = made()
    method.restructure({"found": True})
    method(random_batch(6))
    assert not method.centres.any()  # those of the checkpoint would be here


def test_hidden_cells_are_seen_by_nobody_and_counted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = made(mask_ratio=0.5, cells="masked"), random_batch(4)
    seen: list[Tensor] = []
    encode = method.student.encode_image

    def watched(pixels: Tensor, levels: Any = ()) -> Any:
        seen.append(pixels)
        return encode(pixels, levels)

    monkeypatch.setattr(method.student, "encode_image", watched)
    every = made(mask_ratio=0.5).terms(batch)["patches"].value
    alone = method.terms(batch)["patches"].value
    assert not torch.equal(every, alone)
    hidden = method._hidden(batch)
    assert hidden.shape == (4, 2, 2)
    assert hidden.flatten(1).sum(1).tolist() == [2] * 4
    squares = seen[0].unflatten(2, (2, 8)).unflatten(4, (2, 8)).abs().amax((1, 3, 5))
    assert torch.equal(squares == 0, hidden)
    assert not torch.equal(hidden, method._hidden(replace(batch, ids=tuple("abcd"))))
    method.eval().terms(batch)
    assert torch.equal(seen[-1], batch.inputs["student"].images)  # a model that is asked sees everything


def test_a_weight_of_zero_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    method = made(patch_weight=0, feature_weight=0)
    monkeypatch.setattr(method, "_find_prototypes", None)
    assert method.student_needs.image_levels == method.teacher_needs.image_levels == ()
    assert tuple(method.terms(random_batch(4))) == method.term_names == ("contrastive",)
    assert method.project is None
    assert method.map_tokens is None


def test_settings_that_do_not_fit_are_refused() -> None:
    class Flat(TinyDualEncoder):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.image_levels = ()

    with pytest.raises(ConfigError, match="cells: masked compares hidden cells alone, and mask_ratio 0 hides none"):
        made(cells="masked")
    with pytest.raises(ConfigError, match="reads patches, and the student test-16 has no image level"):
        make_method("tipsv2", student=make_model(kind=Flat), teacher=make_teacher())
    with pytest.raises(ConfigError, match=r"some must be hidden and some seen"):
        made(mask_ratio=0.01, cells="masked", prototypes=2) and made(mask_ratio=0.999)
    with pytest.raises(
        ConfigError, match="prototypes is 90, and the first batch has 36 tokens of the teacher: lower it"
    ):
        made(prototypes=90)(random_batch(4))

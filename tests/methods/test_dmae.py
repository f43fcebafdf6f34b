"""DMAE: what student and teacher compute, its terms written out, both forms, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_fitnet import deep
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.features.drawn_places import drawn_places
from cmapkd.methods import StepInfo
from cmapkd.methods.dmae import DMAE
from cmapkd.methods.dmae_config import PUBLISHED_ALIGN_WEIGHT, DmaeConfig
from cmapkd.models import FrozenTeacher
from cmapkd.models.visible_tokens import only_visible, token_grid, visible_pixels
from cmapkd.objectives import contrastive_loss, direction_distance, patches_of, reconstruction_error
from helpers import make_method, random_batch

STEP = StepInfo(3, 10, seed=9)


def of_one_grid(dim: int = 24) -> FrozenTeacher:
    """A deeper and wider teacher of the student's image size."""
    return FrozenTeacher(deep(4, dim=dim, width=64, seed=7))


def batch_of_one_size(size: int = 4, dtype: torch.dtype = torch.float32) -> Batch:
    """The teacher's pictures are the student's."""
    batch = random_batch(size, dtype=dtype)
    batch.inputs["teacher"] = replace(batch.inputs["student"])
    return batch


def made(teacher: FrozenTeacher | None = None, **settings: Any) -> DMAE:
    settings = {"teacher_sees": "visible", "mask_ratio": 0.5, **settings}
    method = make_method("dmae", student=deep(3), teacher=teacher or of_one_grid(), settings=settings)
    assert isinstance(method, DMAE)
    method.step = STEP
    return method


def sizes_in_blocks(model: Any, compute: Any) -> set[int]:
    """Numbers of tokens that a model's last block sees."""
    seen: set[int] = set()
    handle = model.image_blocks[-1].register_forward_hook(lambda _m, inputs, _o: seen.add(inputs[0].shape[1]))
    compute()
    handle.remove()
    return seen


def keep_of(batch: Batch) -> Tensor:
    return drawn_places(batch.ids, count=2, of=4, key=("visible", 9, 3))


def test_both_models_compute_the_visible_tokens_alone() -> None:
    method, batch = made(), batch_of_one_size()
    assert method.teacher is not None
    for model in (method.student, method.teacher.model):
        assert sizes_in_blocks(model, lambda: method.terms(batch)) == {3}  # a class token and two of four cells
    whole = made(teacher_sees="whole")
    assert whole.teacher is not None
    assert sizes_in_blocks(whole.student, lambda: whole.terms(batch)) == {3}
    assert sizes_in_blocks(whole.teacher.model, lambda: whole.terms(batch)) == {5}
    assert not any(block._forward_hooks for block in method.student.image_blocks)


@pytest.mark.parametrize("sees", ["visible", "whole"])
def test_terms_are_their_formulas_written_out(sees: str) -> None:
    method, batch = made(teacher_sees=sees), batch_of_one_size()
    keep, pixels = keep_of(batch), batch.inputs["student"].images
    assert method.teacher is not None
    assert method.decode is not None
    assert method.map is not None
    student, teacher = method.student, method.teacher.model
    shown = visible_pixels(pixels, keep, (2, 2))
    with only_visible(student, token_grid(student), keep) as ours:
        embedding = student.encode_image(shown).embedding
    if sees == "visible":
        with torch.no_grad(), only_visible(teacher, token_grid(teacher), keep) as theirs:
            teacher.encode_image(shown)
        target = theirs[2]  # three quarters of four blocks
    else:
        level = teacher.encode_image(pixels, ("blocks.2",)).levels["blocks.2"].values
        target = torch.stack([level[i, [0, *(1 + keep[i])]] for i in range(4)])
    terms = method.terms(batch)
    text = student.encode_text(batch.inputs["student"].texts).embedding
    expected = {
        "contrastive": contrastive_loss(embedding, text, logit_scale=student.log_logit_scale.exp()),
        "reconstruction": reconstruction_error(method.decode(ours[2], keep), patches_of(pixels, (2, 2)), keep).mean(),
        "align": direction_distance(method.map(ours[1]), target).mean(),  # three quarters of three blocks are two
    }
    assert {name: term.weight for name, term in terms.items()} == {
        "contrastive": 1.0, "reconstruction": 1.0, "align": PUBLISHED_ALIGN_WEIGHT
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].value, value, msg=name)


def test_self_distillation_compares_embeddings_of_whole_pictures() -> None:
    teacher = FrozenTeacher(deep(3, seed=5))
    method, batch = made(teacher, align="embedding"), batch_of_one_size()
    terms, pixels = method.terms(batch), batch.inputs["student"].images
    ours, theirs = (model.encode_image(pixels).embedding for model in (method.student, teacher.model))
    text = method.student.encode_text(batch.inputs["student"].texts).embedding
    scale = method.student.log_logit_scale.exp()
    torch.testing.assert_close(terms["align"].value, (ours - theirs).square().sum() / 4)
    torch.testing.assert_close(terms["contrastive"].value, contrastive_loss(ours, text, logit_scale=scale))
    torch.testing.assert_close(terms["reconstruction"].value, made().terms(batch)["reconstruction"].value)
    assert terms["align"].weight == 1.0
    assert method.teacher_detail == "global"


@pytest.mark.parametrize("settings", [{}, {"align": "embedding"}])
def test_micro_batches_are_the_batch_and_each_step_hides_other_cells(settings: dict[str, Any]) -> None:
    found: list[dict[str, Tensor]] = []
    for micro_batch, step in ((None, 3), (2, 3), (None, 4)):
        teacher = FrozenTeacher(deep(3, seed=5)) if settings else of_one_grid()
        method = made(teacher, **settings).double()
        teacher.model.double()
        method.micro_batch = micro_batch
        terms = method(batch_of_one_size(5, torch.float64), StepInfo(step, 10, seed=9))
        torch.stack([term.value for term in terms.values()]).sum().backward()
        gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        found.append({name: term.value.detach() for name, term in terms.items()} | gradients)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-8, atol=1e-12)
    assert not torch.isclose(found[0]["reconstruction"], found[2]["reconstruction"])


def test_pictures_alone() -> None:
    """As published: no caption is read, and the text tower has no gradient."""
    method = made(task_weight=0)
    assert not method.config.reads_captions
    terms = method(batch_of_one_size())
    assert set(terms) == {"reconstruction", "align"}
    torch.stack([term.value for term in terms.values()]).sum().backward()
    assert not any(p.grad is not None for name, p in method.named_parameters() if name.startswith("student.text."))


def test_modules_stand_only_where_a_term_reads_them() -> None:
    assert {name.split(".")[0] for name, _ in made().named_parameters()} == {"student", "decode", "map"}
    assert {name.split(".")[0] for name, _ in made(reconstruction_weight=0).named_parameters()} == {"student", "map"}
    less = made(align_weight=0)
    assert {name.split(".")[0] for name, _ in less.named_parameters()} == {"student", "decode"}
    assert set(less(batch_of_one_size())) == {"contrastive", "reconstruction"}
    assert less.not_cached is None
    wide = made(decoder_width=64, decoder_depth=3)
    assert wide.decode is not None
    assert (wide.decode.embed.out_features, len(wide.decode.blocks)) == (64, 3)


def test_what_is_refused() -> None:
    assert "the teacher sees other tokens in every step" in str(made().not_cached)
    assert made(teacher_sees="whole").not_cached is None
    with pytest.raises(ConfigError, match=r"have 2 x 2 cells and the teacher's 3 x 3, .* set teacher_sees: whole"):
        make_method("dmae", settings={"teacher_sees": "visible"})
    with pytest.raises(ConfigError, match=r"has 4 cells, of which method\.mask_ratio 0\.9 shows 0"):
        made(mask_ratio=0.9)
    with pytest.raises(ConfigError, match="have width 16 and the teacher's 24: take an earlier student"):
        made(align="embedding")
    with pytest.raises(ValueError, match="multiple of 32"):
        DmaeConfig(name="dmae", decoder_width=40)

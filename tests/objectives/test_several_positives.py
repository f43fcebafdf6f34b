"""Captions of one picture in a batch are no negatives of each other, in every contrastive loss and method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.config import ConfigError
from cmapkd.data.pictures import PictureReader
from cmapkd.data.types import Sample
from cmapkd.data.views import View
from cmapkd.methods import METHODS
from cmapkd.objectives import contrastive_loss, interactive_loss, sigmoid_loss
from cmapkd.objectives.contrastive import matching_loss
from helpers import CMAPKD_IN_FULL, make_method, random_batch

PICTURES = torch.tensor([5, -1, 5, 7])  # the first and the third pair show one picture


def pairs(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, dtype=torch.float64, generator=generator) for _ in range(count)]


def by_hand(anchors: Tensor, candidates: Tensor, scale: float) -> Tensor:
    """Each row over its own candidate and those of other pictures."""
    anchors, candidates = (torch.nn.functional.normalize(x, dim=-1) for x in (anchors, candidates))
    losses = []
    for row in range(4):
        kept = [column for column in range(4) if column == row or PICTURES[column] != PICTURES[row]]
        logits = scale * anchors[row] @ candidates[kept].T
        losses.append(logits.logsumexp(0) - logits[kept.index(row)])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_softmax_losses_are_the_sums_written_out(chunk: int | None) -> None:
    image, text, of_teacher, texts_of_teacher = pairs(4)
    there, back = by_hand(image, text, 3.0), by_hand(text, image, 3.0)
    options: dict[str, Any] = {"logit_scale": 3.0, "pictures": PICTURES, "chunk": chunk}
    torch.testing.assert_close(matching_loss(image, text, **options), there)
    torch.testing.assert_close(contrastive_loss(image, text, **options), (there + back) / 2)
    crossed = (by_hand(image, texts_of_teacher, 3.0) + by_hand(text, of_teacher, 3.0)) / 2
    torch.testing.assert_close(interactive_loss(image, text, of_teacher, texts_of_teacher, **options), crossed)
    plain = contrastive_loss(image, text, logit_scale=3.0, chunk=chunk)
    assert contrastive_loss(image, text, **options) < plain  # fewer negatives
    alone = contrastive_loss(image, text, logit_scale=3.0, pictures=torch.arange(4), chunk=chunk)
    torch.testing.assert_close(alone, plain)


@pytest.mark.parametrize("chunk", [None, 1])
def test_the_sigmoid_loss_leaves_such_combinations_out(chunk: int | None) -> None:
    image, text = pairs()
    logits = 3.0 * torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T - 1.0
    nats = torch.nn.functional.softplus(logits)
    nats = torch.where(torch.eye(4, dtype=torch.bool), torch.nn.functional.softplus(-logits), nats)
    nats[0, 2] = nats[2, 0] = 0
    found = sigmoid_loss(image, text, logit_scale=3.0, logit_bias=-1.0, pictures=PICTURES, chunk=chunk)
    torch.testing.assert_close(found, nats.sum() / 4)


def test_gradients() -> None:
    image, text = (x.requires_grad_() for x in pairs())
    assert gradcheck(lambda i, t: contrastive_loss(i, t, logit_scale=3.0, pictures=PICTURES), (image, text))
    assert gradcheck(lambda i, t: sigmoid_loss(i, t, logit_scale=3.0, logit_bias=0.1, pictures=PICTURES), (image, text))


def test_pictures_are_told_apart_by_their_pixels() -> None:
    def number(image: Image.Image, name: str) -> int:
        return PictureReader().read(Sample(name, image, ("a",)), View(), 0)

    grey, wide = Image.new("RGB", (4, 6), (9, 9, 9)), Image.new("RGB", (6, 4), (9, 9, 9))
    other = grey.copy()
    other.putpixel((3, 5), (9, 9, 8))
    assert number(grey, "a") == number(grey.copy(), "b")
    assert len({number(each, "a") for each in (grey, wide, other)}) == 3
    assert PictureReader().join([number(grey, "a")]).dtype == torch.int64


CONTRASTIVE = {
    "contrastive": {},
    "albef": {},
    "hinton": {},
    "clip_kd": {"augmented_weight": 0.5},
    "clip_rd": {},
    "mobileclip": {},
    "tinyclip": {"alpha": 0.5},
    "dc_clip": {"task_weight": 1.0},
    "fitnet": {},
    "acam_kd": {},
    "dmae": {},
    "trg_token_graph": {},
    "cmapkd": CMAPKD_IN_FULL,
    "clip_refine": {"task_weight": 1.0},
    "clip_ping": {},
    "clip_cid": {},
    "radio": {},
    "tipsv2": {},
    "vlm_distill_ood": {},
}
ON_REQUEST = {"clip_refine", "tinyclip"}  # contrast pairs with the settings above alone
WITH_TEACHER_ALONE = {"cosmos": "distill", "dclip": "meta_teacher"}


def test_no_method_is_left_out_here() -> None:
    """Every method with a term that contrasts pairs is one of those below."""
    contrasting = set()
    for name in METHODS:
        try:
            make_method(name, settings={"several_positives": True})
        except ConfigError:
            continue  # it has no such term as it is set, or its student writes
        contrasting.add(name)
    assert contrasting == {*CONTRASTIVE, *WITH_TEACHER_ALONE, "degla"} - ON_REQUEST


@pytest.mark.parametrize(("name", "reads"), WITH_TEACHER_ALONE.items())
def test_contrasts_with_a_teacher_alone_read_the_option(name: str, reads: str) -> None:
    method = make_method(name, settings={"task_weight": 0, "several_positives": True}).train()
    batch = random_batch(4, pools=method.text_pools, views=method.more_views)
    batch.extra["pictures"] = torch.zeros(4, dtype=torch.int64)
    assert method(batch)[reads].value.item() == pytest.approx(0.0, abs=1e-6)
    batch.extra["pictures"] = torch.arange(4)
    assert method(batch)[reads].value.item() > 0.1


def test_false_captions_stay_negatives() -> None:
    method = make_method("degla", settings={"several_positives": True}).train()
    batch = random_batch(4, pools=method.text_pools)
    batch.extra["pictures"] = torch.arange(4)
    apart = method(batch)["contrastive"].value.item()
    batch.extra["pictures"] = torch.zeros(4, dtype=torch.int64)
    assert 0.1 < method(batch)["contrastive"].value.item() < apart


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_every_method_has_the_option(name: str) -> None:
    """With one picture in the whole batch no term that contrasts pairs has anything left to do."""
    assert name in METHODS
    torch.manual_seed(0)
    method = make_method(name, settings={**CONTRASTIVE[name], "several_positives": True})
    batch = random_batch(6, rich=True)
    batch.extra["pictures"] = torch.zeros(6, dtype=torch.int64)
    method.train()
    named = {*method.contrasts, "alignment", "bridge"}
    contrasts = {term: value.value for term, value in method(batch).items() if term in named}
    assert contrasts
    for term, value in contrasts.items():
        assert value.item() == pytest.approx(0.0, abs=1e-6), term
    batch.extra["pictures"] = torch.arange(6)
    assert all(value.value.item() > 0.1 for term, value in method(batch).items() if term in contrasts)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("promptkd", {}), ("c2kd", {}), ("hinton", {"form": "classes"}), ("hinton", {"task_weight": 0}), ("tinyclip", {})],
)
def test_the_option_is_refused_where_no_loss_reads_it(name: str, settings: dict[str, Any]) -> None:
    make_method(name, settings=settings)
    with pytest.raises(ConfigError, match=f"method {name}, as it is set, has no loss that reads several_positives"):
        make_method(name, settings={**settings, "several_positives": True})

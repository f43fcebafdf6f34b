"""DCLIP: its meta-teacher and its terms written out in loops, regions that are padding, its stages and its errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.features.region_fusion import RegionFusion, pooled_near_mean
from cmapkd.methods.dclip import Dclip
from cmapkd.methods.stages import WHOLE_RUN
from cmapkd.methods.step import StepInfo
from cmapkd.models import Features, LevelRequest
from helpers import GRADNORM, make_builder, make_method, make_model, make_teacher, random_batch


def dclip(**settings: Any) -> Dclip:
    method = make_method("dclip", settings=settings)
    assert isinstance(method, Dclip)
    return method.train()


def batch_for(method: Dclip, size: int = 4) -> Batch:
    return random_batch(size, views=method.more_views)


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def attended(attention: nn.MultiheadAttention, query: Tensor, keys: Tensor) -> Tensor:
    """One query over the keys that are there, head by head."""
    width, heads = len(query), attention.num_heads
    q, k, v = attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
    read = []
    for head in range(heads):
        here = slice(head * width // heads, (head + 1) * width // heads)
        own = (q @ query + b_q)[here]
        scores = torch.stack([own @ (k @ key + b_k)[here] / math.sqrt(width / heads) for key in keys]).softmax(0)
        values = torch.stack([(v @ key + b_v)[here] for key in keys])
        read.append((scores[:, None] * values).sum(0))
    found: Tensor = attention.out_proj(torch.cat(read))
    return found


def pooled(rows: Tensor) -> Tensor:
    mean = rows.mean(0)
    weights = torch.stack([(row @ mean) / (row.norm() * mean.norm()) / 2 for row in rows]).exp()
    return (weights[:, None] * rows).sum(0) / weights.sum()


def test_the_meta_teacher_is_its_formulas_in_loops() -> None:
    torch.manual_seed(0)
    fusion = RegionFusion(8, 5, heads=2).double()
    for norm in (fusion.norm_words, fusion.norm_regions):
        nn.init.normal_(norm.weight)
    regions, words = torch.randn(3, 4, 8).double(), torch.randn(3, 6, 5).double()
    regions_of, words_of = (1, 4, 2), (6, 2, 3)
    real = [torch.arange(most) < torch.tensor(of)[:, None] for most, of in ((4, regions_of), (6, words_of))]
    found = fusion(regions, words, *real)
    for row, (n, m) in enumerate(zip(regions_of, words_of, strict=True)):
        p, c = regions[row, :n], fusion.map_words(words[row, :m])
        c_read = fusion.norm_words(torch.stack([each + attended(fusion.words_read.attn, each, p) for each in c]))
        p_read = fusion.norm_regions(torch.stack([each + attended(fusion.regions_read.attn, each, c) for each in p]))
        torch.testing.assert_close(found[row], (pooled(c_read) + pooled(p_read)) / 2)
    small, few = RegionFusion(2, 2, heads=1).double(), [mask[:2, :2] for mask in real]
    given = (torch.randn(2, 2, 2).double().requires_grad_() for _ in range(2))
    assert gradcheck(lambda p, c: small(p, c, *few), tuple(given))


def test_pooling_stays_near_the_mean_and_reads_no_padding() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    real = torch.tensor([[True, False, False], [True, True, True]])
    found = pooled_near_mean(x, real)
    torch.testing.assert_close(found[0], x[0, 0])
    torch.testing.assert_close(found[1], pooled_near_mean(x, None)[1])
    torch.testing.assert_close(pooled_near_mean(x[:, :1].expand(-1, 3, -1), None), x[:, 0])
    assert gradcheck(pooled_near_mean, (x.requires_grad_(), real))


def test_terms_are_their_formulas() -> None:
    method = dclip()
    batch = batch_for(method)
    answers = method._answers(batch)
    fused, said = answers["fused"], answers["said"]
    student = method.encode_student(batch)
    v, t, g, t_t = (unit(x) for x in (student.image.embedding, student.text.embedding, fused, said))

    def contrast(a: Tensor, b: Tensor) -> Tensor:
        sums = [torch.logsumexp(20 * a[i] @ b.T, 0) + torch.logsumexp(20 * b[i] @ a.T, 0) for i in range(4)]
        return torch.stack([total / 2 - 20 * a[i] @ b[i] for i, total in enumerate(sums)]).mean()

    expected = {
        "meta_teacher": contrast(g, t_t),
        "image": (1 - (v * g).sum(-1)).mean(),
        "text": (1 - (t * t_t).sum(-1)).mean(),
        "contrastive": contrast(v, t),
    }
    terms = method.terms(batch)
    assert tuple(terms) == method.term_names == tuple(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].value, value, msg=name)
    other = dclip(targets="shuffled").terms(batch)
    torch.testing.assert_close(other["image"].value, (1 - (v * g.roll(1, 0)).sum(-1)).mean())
    torch.testing.assert_close(other["meta_teacher"].value, terms["meta_teacher"].value)


def test_padding_of_regions_is_not_read_and_without_regions_the_picture_is() -> None:
    method = dclip(regions=3)
    batch = batch_for(method)
    batch.extra["regions"] = torch.tensor([1, 2, 3, 1])
    expected = method.terms(batch)["meta_teacher"].value
    pairs = batch.pairs("teacher")
    views = pairs.more_images["regions"].clone().unflatten(0, (4, 3))
    views[0, 1:] = views[1, 2:] = views[3, 1:] = 0.5
    changed = replace(pairs, more_images={"regions": views.flatten(0, 1)})
    found = method.terms(replace(batch, inputs={**batch.inputs, "teacher": changed}))
    torch.testing.assert_close(found["meta_teacher"].value, expected)
    alone = dclip(regions=0)
    assert not alone.more_views
    assert "regions" not in alone.extras
    assert alone.teacher_needs.towers == ("image", "text")
    assert alone.terms(random_batch(4))["meta_teacher"].value.isfinite()


def test_each_stage_trains_its_own_part() -> None:
    method = dclip()
    for stage, (terms, learns) in zip(
        method.default_stages,
        (({"meta_teacher"}, {"fusion"}), ({"image", "text", "contrastive"}, {"student"})),
        strict=True,
    ):
        method.enter(stage)
        method.zero_grad()
        found = method(batch_for(method))
        torch.stack([term.value for term in found.values()]).sum().backward()
        assert found.keys() == terms
        changed = {name.partition(".")[0] for name, each in method.named_parameters() if each.grad is not None}
        assert changed == learns
    assert not method.student.log_logit_scale.requires_grad


def test_what_no_term_of_the_stage_reads_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    method = dclip(image_weight=0)
    meta, distil = method.default_stages
    asked: list[LevelRequest] = []
    encode = method._encode_teacher

    def noted(part: Batch, role: str | None = None) -> Features:
        asked.append(method.teacher_needs)
        return encode(part, role)

    monkeypatch.setattr(method, "_encode_teacher", noted)
    method.enter(meta)
    method(batch_for(method))
    assert asked.pop().views == ("regions",)
    method.enter(distil)
    assert tuple(method(batch_for(method))) == ("text", "contrastive")
    assert asked.pop() == LevelRequest(towers=("text",))
    method.enter(distil.model_copy(update={"terms": ("contrastive",)}))
    method(batch_for(method))
    assert not asked


def test_weightings_by_gradients_find_a_layer_in_every_stage() -> None:
    method = dclip(term_weighting=GRADNORM)
    for stage in (WHOLE_RUN, *method.default_stages):
        method.enter(stage)
        for step in range(3):
            method(batch_for(method), StepInfo(step, 10, stage))["weighted"].value.backward()
        assert all(f"terms/gradient_norm/{name}" in method.measurements for name in stage.terms or method.term_names)


def test_only_crops_keep_a_cache_out() -> None:
    assert dclip().not_cached == "crops of regions are drawn anew in every epoch"
    assert dclip(regions=0).not_cached is None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"embeds in 16 numbers and test-24 in 24: take teacher: student"):
        make_method("dclip", student=make_model(), teacher=make_teacher())
    with pytest.raises(ConfigError, match=r"all weights are zero"):
        dclip(image_weight=0, text_weight=0, task_weight=0)
    with pytest.raises(ConfigError, match=r"2 further views 'regions'"):
        make_builder(dclip(), view_specs={})

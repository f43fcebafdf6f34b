"""A run with a cached teacher is the run with the live one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cache_support import VIEWS, cache_plan, train

from cmapkd.cache import CachedTeacher, CacheError, CacheReader, CacheWarning, all_keys
from cmapkd.data.plans import PlanSampler
from cmapkd.data.types import BadSampleError, Sample
from cmapkd.data.views import draw_view
from cmapkd.features import EmbeddingBank
from cmapkd.methods.cmapkd import CMAPKD
from cmapkd.models import LevelRequest
from helpers import MemorySource, make_builder, make_method, make_model, make_teacher

TOLERANCE = {"fp32": 1e-6, "fp16": 2e-3, "int8": 3e-2}  # of a loss of about 2 to 30, over seven steps
POOLED = {
    "visual_levels": {"P5": 1.0},
    "language_levels": {"L3": 0.1, "L4": 1.0},
    "bank": {"size": 12, "store": "fp32"},
    "ablations": {"pyramid_weight": 0.7, "alignment_weight": 0.1, "relation_weight": 3.0, "bridge_dim": 8},
}
DENSE = {**POOLED, "visual_levels": {"P3": 0.1, "P5": 1.0}, "language_levels": {"L1": 0.1, "L2": 0.1, "L4": 1.0}}
ALL_LEVELS = {
    "visual_levels": {"P2": 0.3, "P3": 0.1, "P4": 0.1, "P5": 1.0},
    "language_levels": {"L1": 0.3, "L2": 0.1, "L3": 0.1, "L4": 1.0},
    "bank": {"size": 12, "store": "fp32"},
    "ablations": {"relation_weight": 3.0},
}
DENSE_ALL, POOLED_ALL = ALL_LEVELS, {**ALL_LEVELS, "places": "pooled"}
KEY_TOKENS = {**ALL_LEVELS, "places": "key_tokens", "key_tokens": 3}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "hinton": ("hinton", {}, "global"),
    "clip_kd": ("clip_kd", {}, "global"),
    "clip_rd": ("clip_rd", {}, "global"),
    "radio": ("radio", {"dispersion_steps": 2}, "global"),
    "clip_ping": ("clip_ping", {}, "global"),
    "dho": ("dho", {}, "global"),
    "vl2lite": ("vl2lite", {}, "global"),
    "makd": ("makd", {}, "global"),
    "mst_distill": ("mst_distill", {}, "global"),
    "acam_kd": ("acam_kd", {}, "dense"),
    "trg_token_graph": ("trg_token_graph", {"tokens": 3}, "dense"),
    "biomedcoop": ("biomedcoop", {}, "global"),
    "tipsv2": ("tipsv2", {}, "dense"),
    "clip_refine, raw": ("clip_refine", {"similarity": "raw"}, "global"),
    "vlm_distill_ood, captions": ("vlm_distill_ood", {"caption_weight": 1.0}, "global"),
    "cmapkd, pooled": ("cmapkd", POOLED, "pooled"),
    "cmapkd, dense": ("cmapkd", DENSE, "dense"),
    "cmapkd, levels as one vector": ("cmapkd", {**ALL_LEVELS, "places": "pooled"}, "pooled"),
    "cmapkd, key tokens": ("cmapkd", KEY_TOKENS, "key_tokens"),
    "cmapkd, more key tokens than words": (
        "cmapkd",
        {**KEY_TOKENS, "key_tokens": 40, "ablations": {"key_tokens_by": "norm"}},
        "key_tokens",
    ),
}
ROUNDED = ("clip_kd", "radio", "acam_kd", "dho", "cmapkd, pooled", "cmapkd, dense", "cmapkd, key tokens")
"""Of each kind of cache, and of each thing that is made of answers: read from rounded rows, too. No method knows how
rows are stored."""

PICTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "dmae": ("dmae", {}, "dense"),
    "mulki": ("mulki", {}, "global"),
    "sgva_clip": ("sgva_clip", {}, "global"),
    "zscl": ("zscl", {}, "global"),
}
"""Methods that read no text of their teacher. A cache gives it nevertheless."""

WORDS: dict[str, tuple[str, dict[str, Any], str]] = {"dclip, whole pictures": ("dclip", {"regions": 0}, "dense")}
"""Methods that read tokens of captions, of a teacher of the student's width."""


def assert_close(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if key == "loss" or key.startswith("terms/"):
                assert value == pytest.approx(theirs[key], rel=tolerance, abs=tolerance), (key, mine["step"])


def test_a_bank_in_fp16_may_round_the_last_digit_apart(tmp_path: Path) -> None:
    settings = {**POOLED, "bank": {"size": 12, "store": "fp16"}}
    live, _ = train(tmp_path / "live", "cmapkd", settings)
    cached, _ = train(tmp_path / "cached", "cmapkd", settings, cache={"store": "fp32"})
    assert_close(cached, live, 1e-4)


@pytest.mark.parametrize("name", CASES | PICTURES | WORDS)
def test_cached_and_live_give_the_same_losses(name: str, tmp_path: Path) -> None:
    method, settings, kind = (CASES | PICTURES | WORDS)[name]
    live, _ = train(tmp_path / "live", method, settings)
    for store, tolerance in TOLERANCE.items():
        if name not in ROUNDED and store != "fp32":
            continue
        cached, used = train(tmp_path / store, method, settings, cache={"store": store})
        assert isinstance(used.teacher, CachedTeacher)
        assert used.teacher.cache.layout.kind == kind
        assert all(parameter.is_meta for parameter in used.teacher.model.parameters())
        assert_close(cached, live, tolerance)


def test_in_bf16_and_with_workers(tmp_path: Path) -> None:
    live, _ = train(tmp_path / "live", "clip_kd", precision="bf16", workers=1)
    cached, _ = train(tmp_path / "cached", "clip_kd", cache={}, precision="bf16", workers=1)
    assert_close(cached, live, 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_features_are_the_live_ones(name: str, tmp_path: Path) -> None:
    """Also one view after the other, and each level as a live teacher returns it."""
    kind, settings, _ = CASES[name]
    live = make_method(kind, teacher=make_teacher(), settings=settings)
    method = make_method(kind, teacher=make_teacher(), settings=settings)
    plan = cache_plan(tmp_path / "c", method)
    plan.build(device="cpu")
    reader = plan.open()
    needs: LevelRequest = method.teacher_needs
    builders = [make_builder(live, views=VIEWS), make_builder(method, views=VIEWS, stored={"teacher": reader})]
    method.teacher = plan.cached_teacher(reader, make_model)
    sampler = PlanSampler(24, batch_size=8, seed=0, start=0, stop=9)
    for step in (0, 4, 8):
        one, other = (each[sampler.plan(step)] for each in builders)
        assert one.ids == other.ids
        assert one.captions == other.captions
        assert len(other.stored["teacher"].missing) == 0
        assert ("teacher" in other.inputs) == reader.needs_texts
        assert live.teacher is not None
        expected, found = live.teacher(one, needs), method.teacher(other, needs)
        assert torch.equal(found.logit_scale, expected.logit_scale)
        for tower in needs.towers:
            mine, theirs = getattr(found, tower), getattr(expected, tower)
            torch.testing.assert_close(mine.embedding, theirs.embedding, rtol=1e-5, atol=1e-6)
            assert mine.levels.keys() == theirs.levels.keys()
            for level, values in mine.levels.items():
                if plan.layout.kind != "dense":
                    continue
                wanted = theirs.levels[level]
                assert (values.layout, values.num_prefix, values.grid) == (
                    wanted.layout,
                    wanted.num_prefix,
                    wanted.grid,
                )
                keep = wanted.mask if wanted.mask is not None else torch.ones(wanted.values.shape[:2], dtype=torch.bool)
                torch.testing.assert_close(values.values[keep], wanted.values[keep], rtol=1e-5, atol=1e-5)
                if wanted.mask is not None:
                    assert torch.equal(values.mask, wanted.mask)


def test_pooled_rows_do_not_serve_distances_place_by_place(tmp_path: Path) -> None:
    method = make_method("cmapkd", settings=DENSE)
    with pytest.raises(
        CacheError, match=r"cache.kind is pooled, but this method, as it is set, reads the teacher dense"
    ):
        _ = cache_plan(tmp_path, method, kind="pooled").layout
    pooled = make_method("cmapkd", settings=POOLED)
    cache_plan(tmp_path / "c", pooled).build(device="cpu")
    with pytest.raises(CacheError, match="place by place, which needs dense"):
        cache_plan(tmp_path / "c", method).open()
    embeddings = make_method("clip_kd")
    assert cache_plan(tmp_path / "c", embeddings).open().num_absent(cache_plan(None, embeddings).keys) == 0
    cache_plan(tmp_path / "g", embeddings).build(device="cpu")
    with pytest.raises(CacheError, match="it holds no image level"):
        cache_plan(tmp_path / "g", pooled).open()


def test_richer_rows_serve_a_method_that_reads_less(tmp_path: Path) -> None:
    """Dense rows give key tokens and means, key tokens give means: the losses are those of the live teacher."""
    for stored, settings in ((DENSE_ALL, KEY_TOKENS), (DENSE_ALL, POOLED_ALL), (KEY_TOKENS, POOLED_ALL)):
        folder = tmp_path / f"{stored.get('places')}-for-{settings['places']}"
        live, _ = train(folder / "live", "cmapkd", settings)
        cache_plan(folder / "c", make_method("cmapkd", settings=stored)).build(device="cpu")
        cached, used = train(folder / "cached", "cmapkd", settings, cache={"folder": folder / "c", "mode": "require"})
        assert isinstance(used.teacher, CachedTeacher)
        assert used.teacher.cache.layout.kind == stored.get("places", "dense")
        assert_close(cached, live, 1e-6)


def test_a_bank_drawn_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_cache = {"source": "cache", "size": 30}
    settings = {"bank": of_cache, "visual_levels": {"P5": 1.0}, "language_levels": {"L4": 1.0}}
    cached, method = train(tmp_path / "a", "cmapkd", settings, cache={"store": "fp16"})
    assert isinstance(method, CMAPKD)
    bank, teacher = method.bank, method.teacher
    assert bank is not None
    assert isinstance(teacher, CachedTeacher)
    assert bank.filled == 30
    assert all(0 <= key < 24 for key in bank.keys.tolist())
    assert len({*bank.keys.tolist()}) > 15  # 30 of the 48 views of 24 samples
    assert "bank.image" not in method.state_dict()
    reader = CacheReader(teacher.cache)
    source = MemorySource(24)
    for row, index in enumerate(bank.keys.tolist()):  # each entry is what is stored of one of its sample's views
        found = []
        for view in range(2):
            sample = source[index]
            caption = draw_view(sample.id, view, VIEWS, sample.image.size).choose(sample.captions)
            stored = teacher.cache.layout.decode(reader.read(view, [index], [sample.id], [caption], []).arrays)
            found.append(
                torch.nn.functional.normalize(torch.cat([stored["image"][0], stored["text"][0]]).view(2, -1), dim=-1)
            )
        wanted = torch.stack([bank.image[row], bank.text[row]])
        assert any(torch.allclose(each, wanted.float(), rtol=2**-11, atol=1e-6) for each in found)  # as fp16 rounds
    again, _ = train(tmp_path / "b", "cmapkd", settings, cache={"store": "fp16"})
    assert again == cached  # the same draw in every run
    everything = [torch.cat(parts) for parts in zip(*reader.embeddings(1000, all_keys(24, 2), seed=0), strict=True)]
    assert everything[0].shape == (48, 24)  # no more than there are, and none twice
    assert sorted(everything[2].tolist()) == sorted([*range(24)] * 2)
    monkeypatch.setattr("cmapkd.cache.reader._AT_ONCE", 5 * reader.cache.layout.row_bytes)
    parts = [*reader.embeddings(30, all_keys(24, 2), seed=0)]
    assert [len(part[2]) for part in parts] == [5] * 6
    drawn = EmbeddingBank(30, 24, fixed=True)
    drawn.fill(parts)
    assert all(torch.equal(one, other) for one, other in zip(drawn.buffers(), bank.buffers(), strict=True))


def test_a_sample_is_not_compared_with_its_own_views_in_the_cache(tmp_path: Path) -> None:
    """With a bank of all views: each sample excludes exactly its two."""
    method = make_method("cmapkd", settings={"bank": {"source": "cache", "size": 48}})
    assert isinstance(method, CMAPKD)
    plan = cache_plan(tmp_path / "c", method)
    plan.build(device="cpu")
    reader = plan.open()
    method.teacher = plan.cached_teacher(reader, make_model)
    batch = make_builder(method, views=VIEWS, stored={"teacher": reader})[
        PlanSampler(24, batch_size=8, seed=0, start=0, stop=1).plan(0)
    ]
    method(batch)
    assert method.bank is not None
    samples = batch.stored["teacher"].samples
    assert [f"m{number}" for number in samples.tolist()] == [*batch.ids]
    excluded = method.bank.references(samples).exclude
    assert excluded.sum(1).tolist() == [2] * 8
    for row, sample in enumerate(samples.tolist()):
        assert method.bank.keys[excluded[row]].tolist() == [sample] * 2
    part = batch.part(3, 6).stored["teacher"].samples
    assert torch.equal(part, samples[3:6])


def test_other_key_tokens_are_refused(tmp_path: Path) -> None:
    cache_plan(tmp_path / "c", make_method("cmapkd", settings=KEY_TOKENS)).build(device="cpu")
    for changes in ({"key_tokens": 4}, {"ablations": {"key_tokens_by": "norm"}}):
        plan = cache_plan(tmp_path / "c", make_method("cmapkd", settings={**KEY_TOKENS, **changes}))
        with pytest.raises(CacheError, match=r"it holds key tokens 3 by class, and the method reads (4|3) by"):
            plan.open()
    plan = cache_plan(tmp_path / "c", make_method("cmapkd", settings=DENSE_ALL))
    with pytest.raises(CacheError, match="it holds levels key_tokens, and the method compares them place by place"):
        plan.open()


def test_another_view_or_caption_cannot_pass_for_the_one_asked_for(tmp_path: Path) -> None:
    plan = cache_plan(tmp_path / "c")
    plan.build(device="cpu")
    reader = plan.open()
    source = MemorySource(24)
    sample = source[5]
    captions = [draw_view("m5", view, VIEWS, sample.image.size).choose(sample.captions) for view in (0, 1)]
    reader.read(1, [5], ["m5"], [captions[1]], [])
    for view, ids, texts in ((0, ["m5"], ["another"]), (0, ["m6"], [captions[0]])):
        with pytest.raises(CacheError, match="another sample, view or caption"):
            reader.read(view, [5], ids, texts, [])
    with pytest.raises(CacheError, match="no view 2 of sample 'm5'"):
        reader.read(2, [5], ["m5"], [captions[0]], [])


class Flaky(MemorySource):
    """Samples that cannot be read while the cache is built, and can afterwards; or the other way round."""

    def __init__(self, length: int, *, bad: Any) -> None:
        super().__init__(length, bad=bad)
        self.mended = False

    def __getitem__(self, index: int) -> Sample:
        if not self.mended:
            return super().__getitem__(index)
        return MemorySource(self.length)[index]


def test_samples_without_answer_are_answered_live(tmp_path: Path) -> None:
    live, _ = train(tmp_path / "live", "clip_kd")
    source = Flaky(24, bad=(3, 11))

    def reload() -> Any:
        return make_teacher().model

    method = make_method("clip_kd", student=make_model(), teacher=make_teacher())
    plan = cache_plan(tmp_path / "cached-cache", method, source=source)
    done = plan.build(device="cpu")
    assert sorted(done.bad) == sorted([("m3", "truncated: no end marker"), ("m11", "truncated: no end marker")] * 2)
    source.mended = True
    with pytest.warns(CacheWarning, match="the teacher is loaded to answer"):
        cached, _ = train(tmp_path / "cached", "clip_kd", cache={}, source=source, reload=reload)
    assert_close(cached, live, 3e-6)  # what is answered in a batch of its own rounds apart, by 1e-6 of a loss
    with pytest.warns(CacheWarning), pytest.raises(CacheError, match="other weights than when this run began"):
        train(
            tmp_path / "again",
            "clip_kd",
            cache={"folder": tmp_path / "cached-cache"},
            source=source,
            reload=lambda: make_teacher(seed=8).model,
        )


def test_bad_samples_are_replaced_as_live(tmp_path: Path) -> None:
    source = MemorySource(24, bad=(3, 11), without_caption=(5,))
    live, _ = train(tmp_path / "live", "hinton", source=source)
    cached, _ = train(tmp_path / "cached", "hinton", cache={}, source=source)
    assert_close(cached, live, 1e-6)
    one, two = ((tmp_path / name / "bad_samples.jsonl").read_text() for name in ("live", "cached"))
    assert one == two
    with pytest.raises(BadSampleError):
        cache_plan(tmp_path / "strict", source=source).build(device="cpu", skip_bad=False)

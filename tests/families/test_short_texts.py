"""Text towers computed to the longest text of a batch: the same embeddings, levels and gradients, of every family."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from family_support import CLIP_TEXT, FAMILIES, VIT, make
from family_support import open_clip as small_open_clip
from torch import Tensor

from cmapkd.data.texts import TextChoice
from cmapkd.data.tokens import TokenBatch
from cmapkd.data.types import Batch, ModelInput
from cmapkd.methods import Method
from cmapkd.methods.dual import LABELS
from cmapkd.methods.micro_batches import join_features, micro_batches
from cmapkd.models import DualEncoder, FrozenTeacher, LevelRequest
from cmapkd.models.masked import MaskedEncoder
from cmapkd.models.open_clip_model import OpenClipModel
from cmapkd.models.open_clip_text import encode_short, is_causal, why_whole
from cmapkd.models.untrained import note_trained
from helpers import CLIP_KD_IN_FULL, CMAPKD_EXACT, DUAL, make_method

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("a red square", "a", "red")  # at most 5 tokens, so that they are cut to 8 of 12
WHOLE = {"timm, SigLIP", "hf SigLIP"}
CUT = [name for name in FAMILIES if name not in WHOLE and name != "joined"]  # its text tower is a frozen tiny one
LONG_TEXT = {**CLIP_TEXT, "context_length": 24}
MOBILE = {**LONG_TEXT, "no_causal_mask": True}  # what MobileCLIP's configs say of the text tower


def padded(model: DualEncoder, tokens: TokenBatch) -> TokenBatch:
    """The texts up to the full length, with the padding of their own tokenizer, read whole."""
    more = model.tokenizer.context_length - tokens.ids.shape[1]
    filler = tokens.ids[~tokens.mask]
    ids = F.pad(tokens.ids, (0, more), value=int(filler[0]) if len(filler) else 0)
    spans = None if tokens.spans is None else F.pad(tokens.spans, (0, 0, 0, more))
    return TokenBatch(ids, F.pad(tokens.mask, (0, more)), spans, tokens.per_sample)


def answers(model: DualEncoder, texts: TokenBatch) -> dict[str, Tensor]:
    """Embeddings, levels where tokens are real, and gradients of the text tower."""
    model.zero_grad()
    tower = model.encode_text(texts, [level.name for level in model.text_levels])
    plain = model.encode_text(texts).embedding
    read = {name: level.values * texts.mask[..., None] for name, level in tower.levels.items()}
    for level in tower.levels.values():
        assert level.mask is not None
        assert torch.equal(level.mask, texts.mask)
        assert level.values.shape[:2] == texts.ids.shape
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0), dtype=plain.dtype)
    ((plain * weights).sum() + sum(value.square().mean(0).sum() for value in read.values())).backward()
    found = {"embedding": tower.embedding.detach(), "embedding, no levels": plain.detach()}
    found |= {name: value.detach() for name, value in read.items()}
    return found | {f"d {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Errors as parts of the largest entry. Levels may be shorter than expected."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        own = found[key]
        if own.shape != value.shape:
            value, rest = value[:, : own.shape[1]], value[:, own.shape[1] :]
            assert not rest.any()
        # attention does not change with a key's bias: the gradient of one is rounding of what cancels, about 1
        least = 1.0 if key.endswith("k_proj.bias") else 1e-3
        error = float((own - value).abs().max()) / max(least, float(value.abs().max()))
        assert error < tolerance, f"{key}: {error}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("name", CUT)
def test_short_texts_are_the_same_as_padded_ones(
    name: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    model = make(name, tmp_path).to(dtype)
    assert model.whole_texts is None
    texts = model.tokenizer(SHORT)
    assert texts.ids.shape[1] <= 8 < model.tokenizer.context_length
    assert texts.lengths is not None
    assert texts.lengths.of_each == tuple(texts.mask.sum(1).tolist())
    assert_same(answers(model, texts), answers(model, padded(model, texts)), tolerance)
    part = texts.part(1, 3)
    assert_same(answers(model, part), answers(model, padded(model, part)), tolerance)


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_towers_that_read_the_padding_are_never_cut(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path)
    assert model.whole_texts
    assert "pools" in model.whole_texts or "not causal" in model.whole_texts
    texts = model.tokenizer(SHORT)
    assert texts.lengths is None
    for each in (texts, texts.part(1, 3), texts.rows(torch.tensor([1])), texts.cut()):
        assert each.ids.shape[1] == model.tokenizer.context_length
    if name == "hf SigLIP":  # what a cut would do; open_clip refuses such texts
        cut = TokenBatch(texts.ids[:, :8], texts.mask[:, :8])
        assert (model.encode_text(cut).embedding - model.encode_text(texts).embedding).abs().max() > 1e-3


def test_mobileclip_looks_like_clip_and_is_never_cut(tmp_path: Path) -> None:
    model = small_open_clip(tmp_path, vision_cfg=VIT, text_cfg=MOBILE, custom_text=True)
    assert model.whole_texts is not None
    assert "not causal" in model.whole_texts
    texts = model.tokenizer(SHORT)
    assert texts.part(0, 1).ids.shape[1] == 24
    other = texts.ids.clone()
    other[:, 12:] = 5
    changed = model.encode_text(replace(texts, ids=other)).embedding - model.encode_text(texts).embedding
    assert changed.abs().max() > 1e-4  # padding is read


@pytest.mark.parametrize(
    "more",
    [
        {"custom_text": True},
        {"custom_text": True, "text": {"pool_type": "eos", "eos_id": 49407}},
        {"custom_text": True, "text": {"proj_bias": True, "ls_init_value": 0.1}},
        {"custom_text": True, "text": {"proj_type": "none"}, "embed_dim": 32},
        {"quick_gelu": True},
    ],
    ids=["custom", "eos", "bias and layer scale", "no projection", "quick"],
)
def test_configs_of_open_clip(more: dict[str, Any], tmp_path: Path) -> None:
    text = {**LONG_TEXT, "layers": 2, **more.get("text", {})}
    others = {"embed_dim": 16, **{key: value for key, value in more.items() if key != "text"}}
    model = small_open_clip(tmp_path, vision_cfg=VIT, text_cfg=text, **others)
    model = model.double()
    assert model.whole_texts is None
    texts = model.tokenizer(SHORT)
    assert texts.ids.shape == (3, 8)
    assert_same(answers(model, texts), answers(model, padded(model, texts)), 1e-12)


@pytest.mark.parametrize(
    ("text", "because"),
    [
        ({"no_causal_mask": True, "pool_type": "last"}, "not causal"),
        ({"pool_type": "last"}, "pools by 'last'"),
        ({"embed_cls": True, "pad_id": 0}, "class token"),
    ],
    ids=["SigLIP", "last", "CoCa"],
)
def test_why_towers_of_open_clip_stay_whole(text: dict[str, Any], because: str, tmp_path: Path) -> None:
    model = small_open_clip(tmp_path, vision_cfg=VIT, text_cfg={**LONG_TEXT, **text}, custom_text=True)
    assert model.whole_texts is not None
    assert because in model.whole_texts
    assert model.tokenizer(SHORT).ids.shape[1] == 24


def zoo_tower(config: dict[str, Any]) -> Any:
    """The text tower of an open_clip config with its own rules, small."""
    from open_clip.transformer import TextTransformer

    rules = ("pool_type", "no_causal_mask", "use_pad_mask", "embed_cls", "proj_bias", "ls_init_value", "eos_id")
    text = config["text_cfg"]
    small = {"width": 16, "heads": 2, "layers": 1, "vocab_size": 64, "context_length": 16, "output_dim": 8}
    torch.manual_seed(0)
    return TextTransformer(**small, **{rule: text[rule] for rule in rules if rule in text}).double().eval()


def zoo_tokens(tower: Any, lengths: tuple[int, ...], *, padding: int) -> TokenBatch:
    """Random texts that end with the tower's end token: the highest id, or its `eos_id`."""
    end = tower.eos_id if tower.pool_type == "eos" else 63
    ids = torch.randint(4, 40, (len(lengths), 16), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16)[None] < torch.tensor(lengths)[:, None]
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = end
    return TokenBatch(ids.masked_fill(~mask, padding), mask)


def test_each_config_of_open_clip_is_cut_exactly_where_that_changes_nothing(tmp_path: Path) -> None:
    """Cut or not, by rule, against cut or not, by what a shortened and a padded tower of the same rules answer."""
    kinds: dict[str, set[str]] = {"cut": set(), "whole": set()}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if "hf_model_name" in config["text_cfg"] or "multimodal_cfg" in config:
            continue  # by their own mask, tested above; refused
        tower = zoo_tower(config)
        tokens = zoo_tokens(tower, (5, 8, 3), padding=0)
        because = why_whole(tower, tokens)
        kinds["whole" if because else "cut"].add(name)
        full = tower(tokens.ids)
        if because is None:
            assert is_causal(tower), name
            short, _ = encode_short(tower, tokens.ids[:, :8])
            torch.testing.assert_close(short, full, rtol=0, atol=1e-12)
        else:
            other = tower(torch.where(tokens.mask, tokens.ids, 50))
            assert (other - full).abs().max() > 1e-9, name
    assert {"ViT-B-32", "ViT-L-14", "RN50", "MobileCLIP-B", "ViT-L-14-worldwide"} <= kinds["cut"]
    assert {"ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "MobileCLIP-S1", "MobileCLIP2-S0", "ViT-L-14-CLIPA"} <= kinds[
        "whole"
    ]
    assert not any("SigLIP" in name or "CLIPA" in name for name in kinds["cut"])
    assert len(kinds["cut"]) > 80


def test_padding_with_the_highest_id_is_pooled_and_not_cut() -> None:
    tower = zoo_tower(open_clip.get_model_config("ViT-B-32"))
    tokens = zoo_tokens(tower, (5, 8, 3), padding=0)
    assert why_whole(tower, tokens) is None
    ids = torch.where(tokens.ids == 63, 62, tokens.ids).masked_fill(~tokens.mask, 63)
    because = why_whole(tower, replace(tokens, ids=ids))
    assert because is not None
    assert "argmax" in because


def test_a_tokenizer_that_pads_with_another_id_than_its_tower_masks(tmp_path: Path) -> None:
    model = make("timm, transformers text", tmp_path)
    assert isinstance(model, OpenClipModel)
    tokens = padded(model, model.tokenizer(SHORT))
    assert why_whole(model.model, tokens) is None
    because = why_whole(model.model, replace(tokens, ids=tokens.ids.masked_fill(~tokens.mask, 3)))
    assert because == "its tower masks the id 0, but its tokenizer pads with another"


def test_masks_and_wrappers_read_short_texts_too(tmp_path: Path) -> None:
    model = MaskedEncoder(small_open_clip(tmp_path, vision_cfg=VIT, text_cfg=LONG_TEXT)).double()
    assert model.whole_texts is None
    texts = model.tokenizer(SHORT)
    assert_same(answers(model, texts), answers(model, padded(model, texts)), 1e-12)
    shrunk = model.shrunk()
    assert shrunk.whole_texts is None
    torch.testing.assert_close(shrunk.encode_text(texts).embedding, model.eval().encode_text(texts).embedding)


CAPTIONS = (*SHORT, "two blue circles and one small green triangle", "a blue", "two", "circles", "a small red square")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in DUAL},
    "promptkd": ("promptkd", {"distill_weight": 5.0}),
    "cmapkd, everything": ("cmapkd", CMAPKD_EXACT),
    "cmapkd, key tokens": ("cmapkd", {**CMAPKD_EXACT, "places": "key_tokens", "key_tokens": 12}),
    "clip_kd, everything": ("clip_kd", CLIP_KD_IN_FULL),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[DualEncoder, DualEncoder]:
    """Student and teacher with CLIP's vocabulary; two blocks each, for methods that read inner levels."""
    vision = {**VIT, "layers": 2}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pair")
    text = {**LONG_TEXT, "layers": 2}
    student = small_open_clip(folder / "s", vision_cfg=vision, text_cfg=text)
    teacher = small_open_clip(folder / "t", vision_cfg=vision, text_cfg=text, custom_text=True)
    for model in (student, teacher):
        note_trained(model)  # classes of an untrained text tower are refused
    return student.double(), teacher.double()


def batch_of(method: Method, *, cut: bool) -> Batch:
    inputs: dict[str, Any] = {}
    models = {"student": method.student} | ({"teacher": method.teacher.model} if method.teacher else {})
    for role, model in models.items():
        draws = torch.Generator().manual_seed(1)
        size = model.image_spec.size
        tokens = model.tokenizer(CAPTIONS)
        assert tokens.ids.shape[1] == 16
        pixels = torch.randn(len(CAPTIONS), 3, size, size, generator=draws, dtype=torch.float64)
        pools = {}
        for pool, count in TextChoice(method.text_pools).counts.items():
            more = model.tokenizer([text for text in reversed(CAPTIONS) for _ in range(count)])
            pools[pool] = replace(more, per_sample=count)
        if not cut:
            tokens, pools = padded(model, tokens), {pool: padded(model, more) for pool, more in pools.items()}
        views = {view: pixels.repeat_interleave(count, 0).flip(0, 3) for view, count in method.more_views.items()}
        inputs[role] = ModelInput(pixels, tokens, pools, views)
    names = tuple(f"m{number}" for number in range(len(CAPTIONS)))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, -1, 2])
    regions = dict.fromkeys(method.more_views, labels % 2 + 1)  # how many are real, of dclip's
    return Batch(names, inputs, CAPTIONS, extra={LABELS: labels, **regions})


def results(method: Method, *, cut: bool, micro_batch: int | None) -> dict[str, Tensor]:
    method.micro_batch = micro_batch
    batch = batch_of(method, cut=cut)
    if getattr(method, "bank", None) is not None:  # something to compare with
        with torch.no_grad():
            method(replace(batch, ids=tuple(f"earlier{name}" for name in batch.ids)))
    terms = method(batch)
    torch.stack([term.weight * term.value for term in terms.values()]).sum().backward()
    values = {f"term {key}": term.value.detach() for key, term in terms.items()}
    return values | {f"d {n}": p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_terms_and_gradients_of_every_method(name: str, pair: tuple[DualEncoder, DualEncoder]) -> None:
    """In whole batches and in micro-batches, which are cut once more, each by itself."""
    kind, settings = CASES[name]
    found = []
    for cut, micro_batch in ((False, None), (True, None), (True, 3)):
        student, teacher = (copy.deepcopy(model) for model in pair)
        if kind == "sgva_clip":  # whose teacher is the student as it begins
            teacher = copy.deepcopy(student)
        method = make_method(kind, student=student, teacher=FrozenTeacher(teacher), settings=settings).double().train()
        found.append(results(method, cut=cut, micro_batch=micro_batch))
    assert_same(found[1], found[0], 1e-9)
    assert_same(found[2], found[0], 1e-9)


def test_levels_of_micro_batches_are_joined_at_the_length_of_the_batch(pair: tuple[DualEncoder, DualEncoder]) -> None:
    model = pair[0]
    texts = model.tokenizer(CAPTIONS)
    pixels = torch.zeros(len(CAPTIONS), 3, model.image_spec.size, model.image_spec.size, dtype=torch.float64)
    batch = Batch(tuple(CAPTIONS), {"student": ModelInput(pixels, texts)}, CAPTIONS)
    parts = [part.pairs("student") for part in micro_batches(batch, 3)]
    assert [part.texts.ids.shape[1] for part in parts] == [8, 16, 8]
    needs = LevelRequest(text_levels=("blocks.1",))
    with torch.no_grad():
        joined = join_features([model(part, needs) for part in parts]).text
        expected = model(batch.pairs("student"), needs).text
    torch.testing.assert_close(joined.embedding, expected.embedding, rtol=0, atol=1e-12)
    found, level = joined.levels["blocks.1"], expected.levels["blocks.1"]
    assert found.mask is not None
    assert torch.equal(found.mask, texts.mask)
    real = texts.mask[..., None]
    torch.testing.assert_close(found.values * real, level.values * real, rtol=0, atol=1e-12)


def test_embeddings_of_captions_do_not_depend_on_their_batch(pair: tuple[DualEncoder, DualEncoder]) -> None:
    model = pair[0]
    expected = model.encode_text(padded(model, model.tokenizer(CAPTIONS))).embedding.float()
    expected = F.normalize(expected, dim=-1).detach()
    for size in (1, 3, 8):
        found = model.embed(texts=CAPTIONS, batch_size=size).texts
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_lengths_of_rows_and_pools() -> None:
    mask = torch.arange(20)[None] < torch.tensor((3, 9, 17, 2, 1, 8))[:, None]
    tokens = TokenBatch(mask.long(), mask, per_sample=2).measured()
    assert of_each(tokens) == (3, 9, 17, 2, 1, 8)
    assert tokens.cut().ids.shape == (6, 20)  # 24 would be longer than they are
    parts = [tokens.part(start, start + 1) for start in range(3)]
    assert [part.ids.shape for part in parts] == [(2, 16), (2, 20), (2, 8)]
    assert [of_each(part) for part in parts] == [(3, 9), (17, 2), (1, 8)]
    chosen = tokens.rows(torch.tensor([2, 0]))
    assert (of_each(chosen), chosen.ids.shape) == ((1, 8, 3, 9), (4, 16))
    left = TokenBatch(mask.flip(1).long(), mask.flip(1)).measured()  # padded on the left: nothing to cut
    assert left.cut().ids.shape == (6, 20)
    for shape in ((0, 0), (0,), (2, 0)):
        nothing = TokenBatch(torch.zeros(shape).long(), torch.zeros(shape).bool()).measured()
        assert nothing.cut().ids.shape == shape


def of_each(tokens: TokenBatch) -> tuple[int, ...]:
    assert tokens.lengths is not None
    return tokens.lengths.of_each


def test_a_compiled_model_is_not_compiled_anew_for_other_lengths(pair: tuple[DualEncoder, DualEncoder]) -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter = copy.deepcopy(pair[0]).eval(), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    pixels = torch.zeros(2, 3, model.image_spec.size, model.image_spec.size, dtype=torch.float64)
    with torch.no_grad():
        for texts in (("a", "two red"), ("a red square", "a"), ("two", "red")):
            inputs = ModelInput(pixels, model.tokenizer(texts))
            torch.testing.assert_close(compiled(inputs).text.embedding, model(inputs).text.embedding)
        assert counter.frame_count == 1
        compiled(ModelInput(pixels, model.tokenizer((CAPTIONS[3], "a"))))
    assert counter.frame_count == 2  # another multiple of 8

"""Embedding a source: what runs, once, in which form, and what is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cmapkd.data.types import BadSampleError, TokenBatch
from cmapkd.evaluation.embed import embed
from cmapkd.models.texts import embed_texts
from cmapkd.models.tiny import TinyDualEncoder
from cmapkd.models.types import TowerFeatures

Make = Callable[..., Any]


def test_every_row_is_the_sample_alone(model: TinyDualEncoder, make_source: Make) -> None:
    source = make_source(7, labels=[2, None, 0, 1, None, 2, 1])
    embedded = embed(model, source, batch_size=3, device="cpu")
    assert embedded.ids == tuple(f"m{number}" for number in range(7))
    assert embedded.labels.tolist() == [2, -1, 0, 1, -1, 2, 1]
    assert embedded.captions == tuple(caption for sample in source.captions for caption in sample)
    text = 0
    with torch.no_grad():
        for number, captions in enumerate(source.captions):
            alone = model.encode_image(model.image_spec(source.images[number])[None]).embedding[0]
            torch.testing.assert_close(embedded.images[number], alone / alone.norm(), rtol=0, atol=1e-6)
            for caption in captions:
                alone = model.encode_text(model.tokenizer([caption])).embedding[0]
                torch.testing.assert_close(embedded.texts[text], alone / alone.norm(), rtol=0, atol=1e-6)
                assert embedded.image_of_text[text] == number
                text += 1
    assert text == len(embedded.texts)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12, 100])
def test_batch_size_does_not_matter(model: TinyDualEncoder, make_source: Make, batch_size: int) -> None:
    source = make_source(12)
    one, other = (embed(model, source, batch_size=size, device="cpu") for size in (4, batch_size))
    torch.testing.assert_close(one.images, other.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.texts, other.texts, rtol=0, atol=1e-6)


def test_results_are_unit_vectors_without_gradient(model: TinyDualEncoder, make_source: Make) -> None:
    embedded = embed(model, make_source(), batch_size=5, device="cpu", autocast=torch.bfloat16)
    for values in (embedded.images, embedded.texts):
        assert (values.dtype, values.requires_grad, values.is_inference()) == (torch.float32, False, False)
        torch.testing.assert_close(values.norm(dim=-1), torch.ones(len(values)))


def test_autocast_is_near_and_not_equal(model: TinyDualEncoder, make_source: Make) -> None:
    full, half = (embed(model, make_source(), batch_size=5, device="cpu", autocast=d) for d in (None, torch.bfloat16))
    assert not torch.equal(full.images, half.images)
    assert F.cosine_similarity(full.images, half.images).min() > 0.99


def test_evaluating_inside_autocast_leaves_training_its_gradient(model: TinyDualEncoder, make_source: Make) -> None:
    pixels = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embed(model, make_source(3), batch_size=5, device="cpu", autocast=torch.bfloat16)
        model.encode_image(pixels).embedding.float().sum().backward()
    assert all(p.grad is not None for p in model.vision.blocks.parameters())


def test_each_image_and_each_different_caption_once(
    model: TinyDualEncoder, make_source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"images": 0, "texts": 0}

    def encode_image(images: torch.Tensor, levels: Sequence[str] = ()) -> TowerFeatures:
        counts["images"] += len(images)
        return TinyDualEncoder.encode_image(model, images, levels)

    def encode_text(texts: TokenBatch, levels: Sequence[str] = ()) -> TowerFeatures:
        counts["texts"] += len(texts.ids)
        return TinyDualEncoder.encode_text(model, texts, levels)

    monkeypatch.setattr(model, "encode_image", encode_image)
    monkeypatch.setattr(model, "encode_text", encode_text)
    captions = [("red boat", "a cat"), ("red boat",), (), ("large dog", "a cat", "tree")]
    embedded = embed(model, make_source(4, captions=captions), batch_size=2, device="cpu")
    assert counts == {"images": 4, "texts": 4}
    assert embedded.image_of_text.tolist() == [0, 0, 1, 3, 3, 3]
    assert torch.equal(embedded.texts[0], embedded.texts[2])
    assert torch.equal(embedded.texts[1], embedded.texts[4])


def test_modes_and_random_state_are_as_before(model: TinyDualEncoder, make_source: Make) -> None:
    model.train()
    model.vision.stem.eval()  # a frozen part, as someone may have set it
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    embed(model, make_source(), batch_size=5, device="cpu")
    with pytest.raises(BadSampleError):
        embed(model, make_source(broken=[1]), batch_size=5, device="cpu", on_bad_sample="error")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_skipped_and_listed(model: TinyDualEncoder, make_source: Make, workers: int) -> None:
    whole = embed(model, make_source(9), batch_size=2, device="cpu")
    kept = [0, 1, 2, 3, 6, 8]
    embedded = embed(model, make_source(9, broken=[4, 5, 7]), batch_size=2, device="cpu", workers=workers)
    assert embedded.bad == tuple((f"m{number}", "truncated file") for number in (4, 5, 7))
    assert embedded.ids == tuple(whole.ids[number] for number in kept)
    torch.testing.assert_close(embedded.images, whole.images[kept], rtol=0, atol=1e-6)
    assert embedded.image_of_text.max() == len(kept) - 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_raises_when_asked(model: TinyDualEncoder, make_source: Make, workers: int) -> None:
    with pytest.raises(BadSampleError, match="'m5': truncated file"):
        embed(model, make_source(9, broken=[5, 7]), batch_size=2, device="cpu", on_bad_sample="error", workers=workers)


def test_nothing_readable_is_an_error(model: TinyDualEncoder, make_source: Make) -> None:
    with pytest.raises(ValueError, match=r"no sample of memory could be read \(2 tried\).*'m0': truncated"):
        embed(model, make_source(2, broken=[0, 1]), batch_size=2, device="cpu")
    with pytest.raises(ValueError, match="no sample of memory"):
        embed(model, make_source(0), batch_size=2, device="cpu")


def test_limit_takes_the_first(model: TinyDualEncoder, make_source: Make) -> None:
    embedded = embed(model, make_source(9), batch_size=4, device="cpu", limit=5)
    assert embedded.ids == ("m0", "m1", "m2", "m3", "m4")
    assert len(embed(model, make_source(3), batch_size=4, device="cpu", limit=5).ids) == 3


def test_no_texts_give_no_rows(model: TinyDualEncoder) -> None:
    assert embed_texts(model, [], batch_size=4, device="cpu").shape == (0, model.embed_dim)

"""Pixels as numbers of one byte, and the float32 values that towers read: the same bits as by numpy's division."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cmapkd.models import ImageSpec
from cmapkd.models import images as image_module


def published() -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Every mean and standard deviation that open_clip, timm and the tiny models bring weights for."""
    import open_clip.pretrained
    import timm.models  # noqa: F401  fills the table below
    from timm.models._registry import _model_pretrained_cfgs

    found = {((0.5,) * 3, (0.25,) * 3), ((0.4,) * 3, (0.3,) * 3)}
    for tags in open_clip.pretrained._PRETRAINED.values():
        found |= {(tuple(tag["mean"]), tuple(tag["std"])) for tag in tags.values()}
    found |= {(tuple(entry.mean), tuple(entry.std)) for entry in _model_pretrained_cfgs.values()}
    return sorted(found)


@pytest.fixture
def by_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device whose division is not trusted."""
    monkeypatch.setattr(image_module, "_EXACT", frozenset())
    monkeypatch.setattr(image_module, "_TABLES", {})


def by_numpy(values: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Each value by itself: division by 255, minus the mean, over the standard deviation, each rounded to float32."""
    made = values.numpy().astype(np.float32) / np.float32(255)
    shape = (3, 1, 1)
    return torch.from_numpy(
        (made - np.array(mean, np.float32).reshape(shape)) / np.array(std, np.float32).reshape(shape)
    )


def all_values(rows: int) -> Tensor:
    """Every value in every channel, UInt8[rows 3 16 16], in another order in each row."""
    draws = torch.Generator().manual_seed(rows)
    orders = [torch.randperm(256, generator=draws) for _ in range(3 * rows)]
    return torch.stack(orders).to(torch.uint8).view(rows, 3, 16, 16)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def test_there_are_several_published_normalisations() -> None:
    known = published()
    assert ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)) in known
    assert ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) in known
    assert len(known) >= 7


@pytest.mark.parametrize("rows", [1, 5])
def test_all_values_of_all_channels_have_numpys_bits(rows: int) -> None:
    values = all_values(rows)
    for mean, std in published():
        spec = ImageSpec(16, mean=mean, std=std)  # type: ignore[arg-type]
        made = spec.to_model(values)
        assert made.dtype == torch.float32
        assert torch.equal(bits(made), bits(by_numpy(values, mean, std))), (mean, std)
        assert torch.equal(bits(spec.to_model(values[0])), bits(made[0]))  # of one picture as of a batch


@pytest.mark.usefixtures("by_table")
@pytest.mark.parametrize("rows", [1, 5])
def test_the_table_of_a_device_has_the_same_bits(rows: int) -> None:
    values = all_values(rows)
    for mean, std in published():
        spec = ImageSpec(16, mean=mean, std=std)  # type: ignore[arg-type]
        assert torch.equal(bits(spec.to_model(values)), bits(by_numpy(values, mean, std))), (mean, std)
        assert torch.equal(bits(spec.to_model(values[0])), bits(by_numpy(values[0], mean, std)))
    assert len(image_module._TABLES) == len(published())  # each is computed once


def test_a_product_with_the_reciprocal_would_not_do() -> None:
    """What a device that divides by a product gives: the reason for the table."""
    spec, values = ImageSpec(16), all_values(1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    other = (values.float() * torch.tensor(1 / 255) - mean) / std
    assert not torch.equal(bits(other), bits(spec.to_model(values)))


@pytest.mark.usefixtures("by_table")
def test_rows_may_lie_anywhere_in_memory() -> None:
    """A part of a batch, other strides, and no picture at all."""
    spec, values = ImageSpec(16), all_values(6)
    expected = by_numpy(values, spec.mean, spec.std)
    assert torch.equal(spec.to_model(values[1:5:2]), expected[1:5:2])
    assert torch.equal(spec.to_model(values.to(memory_format=torch.channels_last)), expected)
    assert spec.to_model(values[:0]).shape == (0, 3, 16, 16)


def test_pixels_that_are_normalised_already_stay_as_they_are() -> None:
    spec = ImageSpec(4)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        pixels = torch.randn(2, 3, 4, 4).to(dtype)
        assert spec.to_model(pixels) is pixels


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8])
def test_other_kinds_of_pixels_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"give uint8 from 0 to 255"):
        ImageSpec(4).to_model(torch.zeros(2, 3, 4, 4, dtype=dtype))


def test_a_picture_in_bytes_is_the_resized_picture() -> None:
    draws = np.random.default_rng(0)
    picture = Image.fromarray(draws.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    for spec in (ImageSpec(8), ImageSpec(8, fit="squash"), ImageSpec(20, interpolation="nearest"), ImageSpec(1)):
        for box in (None, (3.0, 2.0, 17.0, 20.0)):
            raw = spec.raw(picture, box)
            assert raw.dtype == torch.uint8
            assert raw.is_contiguous()
            assert raw.permute(1, 2, 0).numpy().tobytes() == spec.pixels(picture, box).tobytes()
            assert torch.equal(bits(spec(picture, box)), bits(by_numpy(raw, spec.mean, spec.std)))


def test_specs_that_differ_in_mean_and_std_alone_have_one_raw_form() -> None:
    one = ImageSpec(8)
    assert one.raw_form == ImageSpec(8, mean=(0.5,) * 3, std=(0.5,) * 3).raw_form
    others = (ImageSpec(9), ImageSpec(8, interpolation="bilinear"), ImageSpec(8, fit="squash"))
    assert one.raw_form not in [other.raw_form for other in others]


@pytest.mark.parametrize("table", [False, True])
def test_a_compiled_graph_normalises_too(table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph, whether or not the table was made before."""
    if table:
        monkeypatch.setattr(image_module, "_EXACT", frozenset())
        monkeypatch.setattr(image_module, "_TABLES", {})
    spec, values = ImageSpec(16), all_values(3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda images: spec.to_model(images) + 1, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(values), by_numpy(values, spec.mean, spec.std) + 1)
    torch._dynamo.reset()

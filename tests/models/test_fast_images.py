"""Pixels by torch's resampling: within a few of 255 of Pillow's, of a crop that was cut out first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cmapkd.models import ImageSpec
from cmapkd.models.fast_images import FastPixels
from cmapkd.models.reading import reader_of
from helpers import make_model


def cut_out(spec: ImageSpec, picture: Image.Image, box: tuple[float, ...] | None) -> torch.Tensor:
    """Pillow's pixels of a crop that was cut out first."""
    if box is None:
        return spec.raw(picture)
    part = picture.crop(tuple(map(int, box)))
    return spec.raw(part, (0.0, 0.0, float(part.width), float(part.height)))


def photograph(width: int, height: int) -> Image.Image:
    """Edges and noise of every scale."""
    draws = np.random.default_rng(width * 1000 + height)
    fine = Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8))
    rough = Image.fromarray(draws.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return Image.blend(fine, rough.resize((width, height), Image.Resampling.NEAREST), 0.6)


SIZES = [(97, 61), (61, 97), (300, 200), (512, 384), (40, 40), (33, 500)]
BOXES = [None, (0.0, 0.0, 33.0, 40.0), (3.0, 2.0, 30.0, 37.0), (7.0, 9.0, 8.0, 10.0)]


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_values_are_near_pillows(size: tuple[int, int], interpolation: str, fit: str) -> None:
    picture = photograph(*size)
    for pixels in (16, 40, 64):
        spec = ImageSpec(pixels, interpolation=interpolation, fit=fit)  # type: ignore[arg-type]
        for box in BOXES:
            fast, exact = FastPixels(spec).raw(picture, box), cut_out(spec, picture, box)
            assert fast.dtype == torch.uint8
            assert fast.shape == exact.shape
            assert fast.is_contiguous()
            assert fast.untyped_storage().nbytes() == fast.numel()  # no larger picture is kept behind it
            difference = (fast.int() - exact.int()).abs()
            assert int(difference.max()) <= 5
            assert float((difference > 1).float().mean()) < 1e-3
            assert float(difference.float().mean()) < 0.3  # torch rounds between rows and columns, too


def test_crops_are_rounded_to_whole_pixels_and_stay_in_the_picture() -> None:
    picture, spec = photograph(50, 40), ImageSpec(16)
    whole = FastPixels(spec).raw(picture, (3, 3, 40, 40))
    assert torch.equal(FastPixels(spec).raw(picture, (3.4, 2.6, 40.4, 39.6)), whole)
    for box in ((49.7, 39.8, 50.0, 40.0), (10.2, 10.3, 10.4, 10.45)):  # less than a pixel
        left, top = min(round(box[0]), 49), min(round(box[1]), 39)
        expected = torch.from_numpy(np.asarray(picture)[top, left].copy())[:, None, None].expand(3, 16, 16)
        assert torch.equal(FastPixels(spec).raw(picture, box), expected)


def test_a_picture_of_the_right_size_stays_as_it_is() -> None:
    picture = photograph(32, 32)
    for fit in ("crop", "squash"):
        spec = ImageSpec(32, fit=fit)  # type: ignore[arg-type]
        assert torch.equal(FastPixels(spec).raw(picture), spec.raw(picture))


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos"])
def test_filters_that_torch_does_not_have_are_pillows(interpolation: str) -> None:
    picture, spec = photograph(50, 40), ImageSpec(16, interpolation=interpolation)  # type: ignore[arg-type]
    for box in (None, (3.4, 2.6, 40.4, 39.6)):
        assert torch.equal(FastPixels(spec).raw(picture, box), spec.raw(picture, box))


def test_models_share_fast_pixels_where_they_share_exact_ones_and_never_both() -> None:
    one, other = FastPixels(ImageSpec(8)), FastPixels(ImageSpec(8, mean=(0.5,) * 3))
    assert one.raw_form == other.raw_form != FastPixels(ImageSpec(9)).raw_form
    assert one.raw_form != ImageSpec(8).raw_form


def test_a_reader_is_fast_where_it_is_told() -> None:
    model, picture = make_model(), photograph(70, 50)
    spec = model.image_spec
    assert torch.equal(reader_of(model).read(picture, None, ("a",)), spec.raw(picture))
    assert torch.equal(reader_of(model, fast=True).read(picture, None, ("a",)), FastPixels(spec).raw(picture))

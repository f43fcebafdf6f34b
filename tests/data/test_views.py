"""Views: pure functions of id, number and spec, with boxes that stay inside the picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cmapkd.data.views import WHOLE, View, ViewSpec, draw_view
from cmapkd.models import ImageSpec

SIZES = [(32, 32), (640, 480), (300, 40), (11, 900), (1, 1)]
WILD = ViewSpec(crop_scale=(0.2, 0.8), crop_ratio=(0.5, 2.0), flip=0.5, jitter=0.3)


def test_pinned_view() -> None:
    """A change here makes every stored teacher answer wrong: it needs a new cache version."""
    view = draw_view("sample-1", 2, WILD, (100, 80))
    assert view.box is not None
    np.testing.assert_allclose(
        view.box, [10.800917698116777, 13.239398553775741, 88.17405736942862, 72.5188328182331], rtol=0, atol=1e-9
    )
    values = [view.brightness, view.contrast, view.saturation, view.caption]
    np.testing.assert_allclose(
        values, [1.1287105052262634, 0.7844185109021948, 1.2217013546080926, 0.4264695604846195], rtol=0, atol=1e-12
    )
    assert view.flip


def test_a_view_depends_on_id_number_and_spec_only() -> None:
    assert draw_view("a", 0, WILD, (50, 40)) == draw_view("a", 0, WILD, (50, 40))
    others = [
        draw_view("b", 0, WILD, (50, 40)),
        draw_view("a", 1, WILD, (50, 40)),
        draw_view("a", 0, WILD.model_copy(update={"jitter": 0.2}), (50, 40)),
    ]
    assert all(other.caption != draw_view("a", 0, WILD, (50, 40)).caption for other in others)


@pytest.mark.parametrize("size", SIZES)
def test_crops_lie_inside_and_have_the_area_asked_for(size: tuple[int, int]) -> None:
    width, height = size
    for number in range(300):
        box = draw_view("a", number, WILD, size).box
        assert box is not None
        left, top, right, bottom = box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        share = (right - left) * (bottom - top) / (width * height)
        clipped = right - left == width or bottom - top == height
        assert share <= 0.8 + 1e-9
        if not clipped:
            assert share >= 0.2 - 1e-9
            assert 0.5 - 1e-9 <= (right - left) / (bottom - top) <= 2 + 1e-9


def test_crops_reach_every_part_of_the_picture() -> None:
    boxes = np.array([draw_view("a", number, WILD, (100, 100)).box for number in range(500)])
    assert boxes[:, :2].min() < 3
    assert boxes[:, 2:].max() > 97
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 10_000
    assert areas.min() < 0.23
    assert areas.max() > 0.77


def test_flips_and_colours_have_the_rates_asked_for() -> None:
    views = [draw_view("a", number, WILD, (9, 9)) for number in range(1000)]
    assert 0.4 < np.mean([view.flip for view in views]) < 0.6
    for name in ("brightness", "contrast", "saturation"):
        values = np.array([getattr(view, name) for view in views])
        assert values.min() >= 0.7
        assert values.max() <= 1.3
        assert abs(values.mean() - 1) < 0.03


def test_whole_view_changes_nothing() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    assert WHOLE.whole
    assert not WILD.whole
    picture, box = draw_view("a", 5, WHOLE, image.size).prepare(image)
    assert picture is image
    assert box is None


def test_mirroring_mirrors_the_crop() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    spec, box = ImageSpec(8), (3.0, 2.0, 17.0, 20.0)
    flipped, flipped_box = View(box=box, flip=True).prepare(image)
    assert flipped_box == (13.0, 2.0, 27.0, 20.0)
    expected = spec.pixels(image, box).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    difference = np.asarray(spec.pixels(flipped, flipped_box), dtype=int) - np.asarray(expected, dtype=int)
    assert abs(difference).max() <= 1  # rounding of the resampling weights
    assert View(flip=True).prepare(image)[1] is None


def test_colour_changes_are_applied() -> None:
    image = Image.new("RGB", (4, 4), (100, 50, 10))
    assert View(brightness=0.5).prepare(image)[0].getpixel((0, 0)) == (50, 25, 5)
    grey = View(saturation=0.0).prepare(image)[0].getpixel((0, 0))
    assert isinstance(grey, tuple)
    assert len(set(grey)) == 1
    assert View(contrast=0.0).prepare(Image.new("RGB", (2, 2), (9, 9, 9)))[0].getpixel((0, 0)) == (9, 9, 9)


def test_every_caption_is_chosen_about_equally_often() -> None:
    captions = ("a", "b", "c", "d", "e")
    chosen = [draw_view("x", number, WHOLE, (9, 9)).choose(captions) for number in range(1000)]
    assert all(150 < chosen.count(caption) < 250 for caption in captions)
    assert draw_view("x", 0, WHOLE, (9, 9)).choose(("only",)) == "only"


def test_views_cycle_over_epochs() -> None:
    assert [ViewSpec(num_views=3).view_number(epoch) for epoch in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert ViewSpec().view_number(7) == 7


@pytest.mark.parametrize(
    "values",
    [{"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.9, 0.5)}, {"crop_scale": (0.5, 1.1)}, {"crop_ratio": (2, 1)}],
)
def test_ranges_that_make_no_sense(values: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="must satisfy"):
        ViewSpec.from_mapping(values)

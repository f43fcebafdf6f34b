"""Every odd but readable picture keeps its pixels; every unreadable one says why."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from making import encode
from PIL import Image

from cmapkd.data.images import decode_image
from cmapkd.data.types import BadSampleError


def pixels(data: bytes) -> list[list[list[int]]]:
    image = decode_image(data, "x")
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def two_by_one(mode: str, left: object, right: object, **info: object) -> Image.Image:
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), left)
    image.putpixel((1, 0), right)
    return image


def test_rgb_is_unchanged() -> None:
    assert pixels(encode(two_by_one("RGB", (1, 2, 3), (250, 251, 252)))) == [[[1, 2, 3], [250, 251, 252]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert pixels(encode(Image.fromarray(values), format)) == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]


def test_sixteen_bit_big_endian_tiff() -> None:
    image = Image.frombytes("I;16B", (2, 1), bytes([0x80, 0x80, 0xFF, 0xFF]))
    assert pixels(encode(image, "TIFF")) == [[[128] * 3, [255] * 3]]


def test_sixteen_bit_pgm() -> None:
    data = b"P5\n2 1\n65535\n" + bytes([0x80, 0x80, 0xFF, 0xFF])
    assert pixels(data) == [[[128] * 3, [255] * 3]]


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    values = np.array([[1000, 32896]], dtype=np.uint16)
    assert pixels(encode(Image.fromarray(values), "PNG", transparency=1000)) == [[[255] * 3, [128] * 3]]


def test_one_bit() -> None:
    assert pixels(encode(two_by_one("1", 0, 255))) == [[[0] * 3, [255] * 3]]


def test_grey() -> None:
    assert pixels(encode(two_by_one("L", 7, 200))) == [[[7] * 3, [200] * 3]]


def test_grey_with_alpha_is_laid_on_white() -> None:
    assert pixels(encode(two_by_one("LA", (10, 255), (10, 0)))) == [[[10] * 3, [255] * 3]]


def test_colour_with_alpha_is_laid_on_white() -> None:
    ((first, second),) = pixels(encode(two_by_one("RGBA", (200, 0, 0, 0), (0, 0, 0, 128))))
    assert first == [255, 255, 255]
    assert second == [127, 127, 127]


def palette() -> Image.Image:
    image = two_by_one("P", 0, 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    return image


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette(format: str) -> None:
    assert pixels(encode(palette(), format)) == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_palette_with_transparency(transparency: int | bytes) -> None:
    assert pixels(encode(palette(), "PNG", transparency=transparency)) == [[[255] * 3, [40, 50, 60]]]


def test_colour_with_a_transparent_value() -> None:
    image = two_by_one("RGB", (1, 2, 3), (4, 5, 6))
    assert pixels(encode(image, "PNG", transparency=(1, 2, 3))) == [[[255] * 3, [4, 5, 6]]]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format: str) -> None:
    found = np.array(pixels(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), format)))
    np.testing.assert_allclose(found.mean((0, 1)), [255, 0, 0], atol=3)


def corner_picture() -> Image.Image:
    image = Image.new("RGB", (3, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    return image


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [
        (1, (3, 2), (0, 0)),
        (2, (3, 2), (2, 0)),
        (3, (3, 2), (2, 1)),
        (4, (3, 2), (0, 1)),
        (5, (2, 3), (0, 0)),
        (6, (2, 3), (1, 0)),
        (7, (2, 3), (1, 2)),
        (8, (2, 3), (0, 2)),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_orientation_is_applied_once(
    orientation: int, size: tuple[int, int], corner: tuple[int, int], format: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encode(corner_picture(), format, exif=exif), "x")
    assert image.size == size
    assert image.getpixel(corner) == (255, 0, 0)


def test_orientation_of_a_jpeg_and_of_grey() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(Image.new("RGB", (30, 20)), "JPEG", exif=exif), "x").size == (20, 30)
    assert decode_image(encode(Image.new("I;16", (30, 20)), "PNG", exif=exif), "x").size == (20, 30)


def test_damaged_exif_leaves_a_good_picture() -> None:
    data = encode(Image.new("RGB", (4, 4)), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert decode_image(data, "x").size == (4, 4)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0][0] == [255, 0, 0]


def noise(size: tuple[int, int] = (64, 64)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image is empty"),
        (b"<html>not found</html>", r'not an image in a known format: it begins with 3c 68 .* \("<html>no"\)'),
        (b"\x00\x01\x02\x03\x04\x05\x06\x07", "it begins with 00 01 02 03 04 05 06 07$"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not an image in a known format"),
        (encode(noise(), "JPEG")[:-900], "image is truncated"),
        (encode(noise(), "PNG")[:-900], "image is truncated"),
        (encode(noise(), "PNG")[:40], "image"),
        (encode(noise(), "WEBP")[:-900], "image"),
        (encode(noise(), "JPEG")[:20], "image"),
        (encode(noise(), "BMP")[:-900], "image is truncated"),
        (encode(Image.new("F", (2, 2)), "TIFF"), "floating-point pixels have no defined white"),
        (encode(Image.new("I", (2, 2)), "TIFF"), "32-bit integer pixels have no defined white"),
    ],
)
def test_unreadable(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason) as caught:
        decode_image(data, "the id")
    assert caught.value.sample_id == "the id"
    assert " at 0x" not in caught.value.reason  # the same in every process


def test_random_damage_never_escapes() -> None:
    random = np.random.default_rng(1)
    for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(encode(noise((24, 24)), format), dtype=np.uint8)
        for _ in range(40):
            data = whole.copy()
            data[random.integers(0, len(data), 6)] = random.integers(0, 255, 6)
            try:
                assert decode_image(data.tobytes(), "x").mode == "RGB"
            except BadSampleError:
                continue


def test_pixel_limit() -> None:
    data = encode(Image.new("1", (100, 100)))
    assert decode_image(data, "x", max_pixels=10_000).size == (100, 100)
    with pytest.raises(BadSampleError, match="too large: 100 x 100 pixels, limit 9999"):
        decode_image(data, "x", max_pixels=9_999)


@pytest.mark.parametrize("side", [12_000, 20_000])  # above Pillow's warning and above its error
def test_decompression_bomb(side: int) -> None:
    file = io.BytesIO()
    Image.new("1", (side, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    import struct
    import zlib

    data[20:24] = struct.pack(">I", side)  # a height that the pixels do not have
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSampleError, match="too large"):
            decode_image(bytes(data), "x", max_pixels=90_000_000)

"""Bytes to an upright RGB picture, or a `BadSampleError` that says why not."""

from __future__ import annotations

import io
import warnings
from functools import cache

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from cmapkd.data.types import BadSampleError

MAX_PIXELS = 178_956_970
"""Where Pillow itself refuses a picture as a decompression bomb (twice its `MAX_IMAGE_PIXELS`)."""

MAX_IMAGE_BYTES = 256 * 2**20
"""Encoded pictures above this are refused before they are read."""

# Only decoders of pixels: Pillow's EPS and PDF readers start other programs, its WMF reader calls the system.
FORMATS = ("JPEG", "PNG", "WEBP", "MPO", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "PCX")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, sample_id: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as RGB, EXIF orientation applied, transparency laid onto white, 16-bit grey scaled to 8.

    Of an animation the first frame is read. Colour profiles are not applied.

    Args:
        data: an encoded picture in one of `FORMATS`.
        sample_id: named in the error.
        max_pixels: width times height above which nothing is decoded; Pillow's own limit holds as well.
    Raises:
        BadSampleError: empty, truncated, damaged, too large, or not a picture.
    """
    if not data:
        raise BadSampleError(sample_id, "image is empty (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata and sizes up to the limit are no news to a training run
        try:
            with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadSampleError(
                        sample_id, f"image is too large: {width} x {height} pixels, limit {max_pixels}"
                    )
                image.load()
                return _upright(_to_rgb(image), _orientation(image))
        except BadSampleError:
            raise
        except Image.DecompressionBombError:
            raise BadSampleError(sample_id, "image is too large: over Pillow's limit of pixels") from None
        except UnidentifiedImageError:
            raise BadSampleError(sample_id, f"not an image in a known format: it begins with {_start(data)}") from None
        except Exception as error:  # damaged bytes raise anything: OSError, SyntaxError, struct.error, zlib.error, ...
            detail = str(error) or type(error).__name__
            kind = "image is truncated" if "truncated" in detail.lower() else "image cannot be decoded"
            raise BadSampleError(sample_id, f"{kind}: {detail}") from None


def _start(data: bytes) -> str:
    """The first bytes, as text too where they are: `74 65 78 74 ("text")`."""
    first = data[:8]
    text = first.decode("ascii", "replace")
    return first.hex(" ") + (f' ("{text}")' if text.isprintable() and text.isascii() else "")


def upright_rgb(image: Image.Image, sample_id: str) -> Image.Image:
    """A picture that is open already as RGB, by the rules of `decode_image`.

    Args:
        sample_id: named in the error.
    Raises:
        BadSampleError: it cannot be read, or has pixels without a defined white.
    """
    try:
        image.load()
        return _upright(_to_rgb(image), _orientation(image))
    except Exception as error:  # an open file can be truncated or damaged as any other
        raise BadSampleError(sample_id, f"image cannot be read: {error or type(error).__name__}") from None


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation after loading (Pillow turns TIFFs itself and then says 1); 1 where EXIF is unreadable."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a picture with damaged metadata is still a picture
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ValueError(f"{kind} pixels have no defined white")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """0..65535 to 0..255: Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.uint32)  # native byte order whatever the file's
    grey = ((values * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")

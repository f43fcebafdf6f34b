"""What names in a tar of samples mean: which are safe, and which sample and field a member is."""

from __future__ import annotations

INDEX_VERSION = 3  # raised with any change of what an index says of the same tar

JSON_CAPTION_KEYS = ("captions", "caption")
TEXT_EXTENSIONS = ("txt", "text", "caption")
SYNTHETIC = "syn.json"  # synthetic captions in a member of their own, as DataCompDR has them

IMAGE_EXTENSIONS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "gif",
    "tif",
    "tiff",
    "ppm",
    "pgm",
    "pbm",
    "jp2",
    "avif",
    "jfif",
)


def is_safe_name(name: str) -> bool:
    """Whether an archive's member name stays inside: not absolute, no `..`, no drive, no NUL."""
    parts = name.replace("\\", "/").split("/")
    return bool(parts[0]) and ".." not in parts and parts[0][1:2] != ":" and "\0" not in name


def key_and_field(name: str) -> tuple[str, str] | None:
    """The key and the field of a member by webdataset's convention; None where the name has no field.

    The key is the path up to the first dot of the base name, the field is the rest in lower case.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return (folder + slash + stem, field.lower()) if stem and field else None


def is_image_behind_a_dot(field: str) -> bool:
    """Whether a field is no image, but its last part is an image's extension.

    webdataset ends the key at the first dot, so that the image `S_02.wav.jpg` is the field `wav.jpg` of `S_02`.
    """
    return "." in field and field.rpartition(".")[2] in IMAGE_EXTENSIONS

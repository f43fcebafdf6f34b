"""Visual Genome as it is downloaded: region descriptions become captions, objects become boxes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmapkd.config import ConfigError
from cmapkd.data.coco import NamedImages
from cmapkd.data.folders import open_images
from cmapkd.data.places import existing_file
from cmapkd.data.reading import Images
from cmapkd.data.rows import Columns
from cmapkd.data.stored import SampleFilter
from cmapkd.data.tables import TableSource, hash_file

EXAMPLE = "visual_genome:region_descriptions.json,objects.json,images"

_COLUMNS = Columns(("image",), ("captions",), ("id",), ())
_FOLDERS = ("", "VG_100K/", "VG_100K_2/")  # the two archives of images, unpacked side by side


def open_visual_genome(rest: str, *, keep: SampleFilter | None = None) -> TableSource:
    """`REGIONS_JSON,OBJECTS_JSON,IMAGES` or one of the two files; IMAGES holds the pictures, `VG_100K` and `VG_100K_2`.

    A sample's captions are the phrases of all regions of its image, its boxes the objects by their first name; its id
    is the image's number. There are no splits.

    Raises:
        ConfigError: a file is missing or of neither form.
    """
    *names, folder = [part.strip() for part in rest.split(",")]
    if len(names) not in (1, 2) or not all((*names, folder)):
        raise ConfigError(f"visual_genome:{rest} must name regions or objects, or both, and images: {EXAMPLE}")
    paths = [existing_file(name, "visual genome") for name in names]
    rows: dict[int, dict[str, Any] | str] = {}
    malformed: list[str] = []
    for path in paths:
        for entry in _read(path):
            number = entry.get("image_id", entry.get("id")) if isinstance(entry, dict) else None
            if not isinstance(number, int) or isinstance(number, bool):
                malformed.append(f"entry is malformed: {str(entry)[:60]!r} has no image_id")
            else:
                rows[number] = _add(rows.get(number, {"id": number, "image": f"{number}.jpg"}), entry)
    images = _Searched(NamedImages(open_images(folder, "visual genome images")))
    digest = "\0".join(hash_file(path) for path in paths)
    every: Iterator[tuple[int, Mapping[str, Any] | str]] = enumerate([*rows.values(), *malformed])
    return TableSource(f"visual_genome:{rest}", every, images, columns=_COLUMNS, contents=digest, keep=keep)


def _read(path: Path) -> list[Any]:
    try:
        values: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"visual genome file {str(path)!r} is not JSON: {error}") from None
    first = values[0] if isinstance(values, list) and values else None
    if not isinstance(values, list) or not isinstance(first, dict) or not ({"regions", "objects"} & set(first)):
        raise ConfigError(
            f"visual genome file {str(path)!r} is no list of images with 'regions' or 'objects': give "
            "region_descriptions.json, objects.json or both."
        )
    return values


def _add(row: dict[str, Any] | str, entry: Mapping[str, Any]) -> dict[str, Any] | str:
    """The image's row with what one entry of either file says of it, or the reason that it cannot be read."""
    regions, things = entry.get("regions") or [], entry.get("objects") or []
    if isinstance(row, str):
        return row
    for values in (regions, things):
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            return f"regions or objects are malformed: {str(values)[:60]!r} of image {row['id']}"
    row["captions"] = [*row.get("captions", ()), *(region.get("phrase") for region in regions)]
    for thing in things:
        names = thing.get("names")
        name = names[0] if isinstance(names, list) and names else None
        box = {"x": thing.get("x"), "y": thing.get("y"), "width": thing.get("w"), "height": thing.get("h")}
        row.setdefault("boxes", []).append(box | {"name": name})
    return row


class _Searched:
    """Pictures by their number, wherever among Visual Genome's folders they lie."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def _resolve(self, name: str) -> str:
        return next((folder + name for folder in _FOLDERS if self.images.has(folder + name)), name)

    def has(self, name: str) -> bool:
        return self.images.has(self._resolve(name))

    def read(self, name: str) -> bytes:
        return self.images.read(self._resolve(name))

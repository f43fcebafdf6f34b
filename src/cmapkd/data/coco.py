"""COCO annotation files (captions, instances) and Karpathy's splits of COCO and Flickr30k, as rows of a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmapkd.config import ConfigError
from cmapkd.data.folders import open_images
from cmapkd.data.places import existing_file
from cmapkd.data.reading import Folder, ZipReader, is_image_name
from cmapkd.data.rows import Columns
from cmapkd.data.splits import pick_split
from cmapkd.data.stored import SampleFilter
from cmapkd.data.tables import TableSource, hash_file

_COLUMNS = Columns(("image",), ("captions",), ("id",), ())


class NamedImages:
    """Images by the name that annotations give them: as it is, else by its last part.

    Annotation files name `COCO_val2014_000000000042.jpg` or `val2014/COCO_val2014_000000000042.jpg`, archives add
    folders of their own: in a zip a last part that occurs once is found wherever it lies.
    """

    def __init__(self, images: Folder | ZipReader) -> None:
        self.images = images
        self._by_base: dict[str, str | None] = {}
        if isinstance(images, ZipReader):
            for name in filter(is_image_name, images.members):
                base = name.rpartition("/")[2]
                self._by_base[base] = None if base in self._by_base else name

    def _resolve(self, name: str) -> str:
        if self.images.has(name):
            return name
        base = name.rpartition("/")[2]
        if isinstance(self.images, ZipReader):
            return self._by_base.get(base) or name
        return base if self.images.has(base) else name

    def has(self, name: str) -> bool:
        return self.images.has(self._resolve(name))

    def read(self, name: str) -> bytes:
        return self.images.read(self._resolve(name))


def open_coco(
    rest: str, *, split: str | None, keep: SampleFilter | None = None, split_is_own: bool = False, kind: str = "coco"
) -> TableSource:
    """`JSON,IMAGES` or `CAPTIONS_JSON,INSTANCES_JSON,IMAGES`; IMAGES is a folder or a zip.

    Args:
        split: of a Karpathy file; `train` includes its `restval`, as the published results do.
        split_is_own: the user wrote the split, so a file without splits is an error.
        kind: what the user called the source.
    Raises:
        ConfigError: a file is missing, is neither form, or has other splits.
    """
    *names, folder = [part.strip() for part in rest.split(",")]
    if not names or not all((*names, folder)):
        raise ConfigError(f"{kind}:{rest} must name annotations and images: coco:captions_val2014.json,val2014/")
    paths = [existing_file(name, "coco annotations") for name in names]
    contents = [_read(path) for path in paths]
    images = NamedImages(open_images(folder, "coco images"))
    karpathy = [_is_karpathy(values) for values in contents]
    if any(karpathy):
        if len(paths) > 1:
            raise ConfigError(f"{kind}:{rest}: a file of Karpathy's splits stands alone, without further annotations")
        rows = _karpathy_rows(contents[0], paths[0], split)
    else:
        if split is not None and split_is_own:
            raise ConfigError(
                f"{kind}:{rest} has no splits (it is not Karpathy's form), so '@{split}' cannot be read from it"
            )
        rows = _coco_rows(contents)
    digest = "\0".join([*(hash_file(path) for path in paths), (split or "") if any(karpathy) else ""])
    suffix = f"@{split}" if any(karpathy) and split else ""
    return TableSource(f"{kind}:{rest}{suffix}", enumerate(rows), images, columns=_COLUMNS, contents=digest, keep=keep)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"coco annotations {str(path)!r} are not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("images"), list):
        raise ConfigError(f"coco annotations {str(path)!r} hold no list 'images': neither COCO's form nor Karpathy's")
    if not _is_karpathy(values) and not isinstance(values.get("annotations"), list):
        raise ConfigError(
            f"coco annotations {str(path)!r} hold no list 'annotations', and no 'sentences' in their images"
        )
    return values


def _is_karpathy(values: Mapping[str, Any]) -> bool:
    return any(isinstance(image, dict) and "sentences" in image for image in values["images"][:1])


def _karpathy_rows(values: Mapping[str, Any], path: Path, split: str | None) -> Iterator[Mapping[str, Any] | str]:
    images = values["images"]
    found = {str(image.get("split")) for image in images if isinstance(image, dict)}
    chosen = pick_split(split, sorted(found - {"restval"} | ({"train"} if "restval" in found else set())), str(path))
    wanted = {chosen, "restval"} if chosen == "train" else {chosen}

    def rows() -> Iterator[Mapping[str, Any] | str]:
        for image in images:
            if not isinstance(image, dict):
                yield "image entry is malformed: not an object"
            elif str(image.get("split")) in wanted:
                folder, name = image.get("filepath"), image.get("filename")
                identity = image.get("cocoid", name)
                yield {
                    "id": identity,
                    "image": f"{folder}/{name}" if folder and name else name,
                    "captions": image.get("sentences"),
                }

    return rows()


def _categories(entries: Any) -> dict[Any, Any]:
    """Names by number."""
    known = entries if isinstance(entries, list) else [entries]
    for entry in known:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int | str) or "name" not in entry:
            raise ConfigError(f"coco annotations: category {str(entry)[:80]} has no id and name")
    return {entry["id"]: entry["name"] for entry in known}


def _coco_rows(contents: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any] | str]:
    """One row an image of any of the files, with its captions and boxes; crowd regions are marked."""
    rows: dict[Any, dict[str, Any]] = {}
    for values in contents:
        mine = set()
        for image in values["images"]:
            if not isinstance(image, dict) or not isinstance(image.get("id"), int | str):
                rows[len(rows), "malformed"] = {}
                continue
            key = (len(rows), "again") if image["id"] in mine else image["id"]
            rows.setdefault(key, {"id": image["id"], "image": image.get("file_name")})
            mine.add(image["id"])
    for values in contents:
        categories = _categories(values.get("categories") or [])
        for annotation in values["annotations"]:
            row = rows.get(annotation.get("image_id")) if isinstance(annotation, dict) else None
            if row is None:
                raise ConfigError(f"coco annotations: {str(annotation)[:80]} belongs to no image of the file")
            if "caption" in annotation:
                row.setdefault("captions", []).append(annotation["caption"])
            elif "bbox" in annotation:
                name = categories.get(annotation.get("category_id"), str(annotation.get("category_id")))
                box = annotation["bbox"] if isinstance(annotation["bbox"], list) else []
                sides = dict(zip(("x", "y", "width", "height"), box, strict=False))
                rest = {"name": name, "crowd": bool(annotation.get("iscrowd")), "area": annotation.get("area")}
                row.setdefault("boxes", []).append(sides | rest)
    for row in rows.values():
        yield row if row else "image entry is malformed: it has no id"

"""Flickr30k and Flickr8k as they are downloaded: Karpathy's JSON, CSV and token files, lists of a split."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmapkd.config import ConfigError
from cmapkd.data.coco import NamedImages, open_coco
from cmapkd.data.folders import open_images
from cmapkd.data.places import existing_file
from cmapkd.data.records import MAX_TEXT_BYTES
from cmapkd.data.rows import Columns
from cmapkd.data.splits import pick_split
from cmapkd.data.stored import SampleFilter
from cmapkd.data.tables import TableSource, hash_file

_COLUMNS = Columns(("image",), ("captions",), (), ())
_TOKEN = re.compile(r"(?P<image>[^\t#]+)#(?P<number>\d+)\t(?P<caption>.*)")
_PIPES = re.compile(r"(?P<image>[^|]+)\|\s*(?P<number>\d+)\s*\|?\s*(?P<caption>.*)")  # one line of it lacks a bar

Rows = list[tuple[int, Mapping[str, Any] | str]]


def open_flickr(
    rest: str,
    *,
    split: str | None,
    split_is_own: bool = False,
    split_file: str | None = None,
    keep: SampleFilter | None = None,
) -> TableSource:
    """`CAPTIONS,IMAGES`, where CAPTIONS is Karpathy's JSON, a CSV, or a token file.

    Read are `dataset_flickr30k.json`; `flickr_annotations_30k.csv` (columns `raw`, a JSON list, `filename`, `split`);
    `results.csv` (`image_name| comment_number| comment`); `captions.txt` (`image,caption`); and
    `results_20130124.token` or `Flickr8k.token.txt` (`1000092795.jpg#0`, a tab, the caption). A sample is an image with
    all its captions; its id is the file's name.

    Args:
        split: of a file that has splits.
        split_is_own: the user wrote the split, so a file without splits is an error.
        split_file: a list of the images to keep, one a line, with or without `.jpg`, for files without splits.
    Raises:
        ConfigError: a file is missing or of no known form, it has other splits, or an image of the list is not in it.
    """
    name, comma, folder = (part.strip() for part in rest.rpartition(","))
    if not comma or not name or not folder:
        raise ConfigError(
            f"flickr30k:{rest} must name captions and images: flickr30k:dataset_flickr30k.json,images@test"
        )
    path = existing_file(name, "flickr30k captions")
    if path.suffix == ".json":
        if split_file is not None:
            raise ConfigError(f"flickr30k:{rest} has splits of its own: name one with '@test' instead of a split_file")
        return open_coco(rest, split=split, keep=keep, split_is_own=split_is_own, kind="flickr30k")
    images = NamedImages(open_images(folder, "flickr30k images"))
    rows, has_splits = _read(path)
    suffix = ""
    if has_splits:
        splits = sorted({str(values["split"]) for _, values in rows if isinstance(values, Mapping)})
        chosen = pick_split(split, splits, str(path))
        rows = [row for row in rows if isinstance(row[1], str) or row[1]["split"] == chosen]
        suffix = f"@{chosen}"
    elif split_is_own:
        raise ConfigError(
            f"flickr30k:{rest} has no splits, so '@{split}' cannot be read from it: add ?split_file=LIST, a text file "
            "with one image a line, or use Karpathy's dataset_flickr30k.json."
        )
    digest = f"{hash_file(path)}\0{suffix}"
    if split_file is not None:
        rows = _listed(rows, existing_file(split_file, "split_file"), path)
        digest += f"\0{hash_file(existing_file(split_file, 'split_file'))}"
    shown = f"flickr30k:{rest}{suffix}"
    return TableSource(shown, rows, images, columns=_COLUMNS, contents=digest, keep=keep)


def _read(path: Path) -> tuple[Rows, bool]:
    """Rows of image and captions, and whether they name splits."""
    csv.field_size_limit(MAX_TEXT_BYTES)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline(MAX_TEXT_BYTES).rstrip("\r\n")
    columns = [name.strip() for name in header.split(",")]
    if {"raw", "filename", "split"} <= set(columns):
        return list(_annotated(path)), True
    if columns == ["image", "caption"]:
        return list(_plain(path)), False
    for pattern, first in ((_PIPES, 2), (_TOKEN, 1)):
        if pattern is _PIPES and not re.match(r"image_name\s*\|", header):
            continue
        if pattern is _TOKEN and not _TOKEN.match(header):
            continue
        return list(_lines(path, pattern, first)), False
    raise ConfigError(
        f"flickr30k captions {str(path)!r} begin with {header[:60]!r}, which is none of the known forms: Karpathy's "
        "JSON, columns raw, filename and split, 'image_name| comment_number| comment', 'image,caption', or lines "
        "'1.jpg#0<tab>caption'."
    )


def _lines(path: Path, pattern: re.Pattern[str], first: int) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if number < first or not line.strip():
                continue
            found = pattern.fullmatch(line.rstrip("\r\n"))
            if found is None:
                yield number, f"line is malformed: {line.strip()[:60]!r}"
            else:
                yield number, {"image": found["image"].strip(), "captions": found["caption"]}


def _plain(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, fields in enumerate(csv.reader(file), start=1):
            if number > 1 and fields:
                fine = len(fields) == 2
                yield number, {"image": fields[0], "captions": fields[1]} if fine else f"{len(fields)} fields, not two"


def _annotated(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, values in enumerate(csv.DictReader(file), start=2):
            try:
                captions = json.loads(values["raw"] or "")
            except (ValueError, RecursionError):
                captions = None
            if not isinstance(captions, list):
                yield number, f"captions are no JSON list: {str(values['raw'])[:60]!r}"
            else:
                yield number, {"image": values["filename"], "captions": captions, "split": values["split"]}


def _listed(rows: Rows, list_file: Path, path: Path) -> Rows:
    wanted = {
        Path(line.strip()).stem for line in list_file.read_text(encoding="utf-8-sig").splitlines() if line.strip()
    }
    found = {Path(str(values["image"])).stem for _, values in rows if isinstance(values, Mapping)}
    if missing := sorted(wanted - found):
        raise ConfigError(
            f"split_file {str(list_file)!r} names {len(missing)} of {len(wanted)} images that {str(path)!r} has no "
            f"captions of, such as {missing[0]!r}"
        )
    return [
        (number, values)
        for number, values in rows
        if isinstance(values, Mapping) and Path(str(values["image"])).stem in wanted
    ]

"""Images in a folder or a zip: class folders, or images with a caption file of the same name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.classes import Classes, parse_classes, read_classes
from cmapkd.data.listed import ListedSource
from cmapkd.data.places import nearest, refuse_url
from cmapkd.data.reading import Folder, ZipReader, is_image_name
from cmapkd.data.records import Record, Unusable
from cmapkd.data.stored import SampleFilter, Texts
from cmapkd.data.tar_index import read_record

CLASSES_FILE = "classes.json"
METADATA_FILE = "metadata.jsonl"


def open_images(name: str, what: str) -> Folder | ZipReader:
    """The folder or zip `name`.

    Raises:
        ConfigError: it is neither.
    """
    refuse_url(name, what)
    path = Path(name).expanduser()
    if path.is_dir():
        return Folder(path)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipReader(path)
    raise ConfigError(f"{what} {name!r} is neither a folder nor a .zip. {nearest(name)}")


class FolderSource(ListedSource):
    """Images of a folder or zip, sorted by path; the id is the path in it.

    The folders that hold the images are classes; folders around all of them (`train/` in a zip) are passed over.
    Images that lie in no class folder have no label. A `.txt` beside an image holds its captions, one a line; a
    `.json` its captions, label, questions and boxes.

    Args:
        classes: a classes JSON, the classes themselves, "none", or None for a `classes.json` inside or beside the
            folder or zip.
        shown: the source's name, where it is not `folder:`.
        texts: keys of an image's JSON that hold further pools of text.
    Raises:
        ConfigError: no images, images both in and beside class folders, or class folders that `classes` does not name.
    """

    def __init__(
        self,
        name: str,
        *,
        keep: SampleFilter | None = None,
        classes: Classes | str | None = None,
        shown: str | None = None,
        texts: Sequence[str] = (),
    ) -> None:
        keep, self._pools = keep or SampleFilter(), tuple(texts)
        shown = shown or f"folder:{name}"
        self._images = open_images(name, f"{shown.partition(':')[0]}:")
        files = sorted(list_files(self._images.path) if isinstance(self._images, Folder) else self._images.members)
        images = [file for file in files if is_image_name(file)]
        self._files = Texts(images)
        beside = {file for file in files if file.endswith((".txt", ".json"))}
        del files
        stems = [*map(_stem, images)]
        self._has = {kind: torch.tensor([f"{stem}.{kind}" in beside for stem in stems]) for kind in ("txt", "json")}
        del beside, stems
        labels = _class_folders(shown, images)
        table = _find_classes(self._images, classes) if labels is not None else None
        names: tuple[str, ...] | None = None
        self._labels: Tensor | None = None  # Int[files]; a tensor is sent to a worker as shared memory
        if labels is not None:
            table = table or _number(sorted(set(labels)))
            names = table.names
            if unknown := sorted(set(labels) - set(table.numbers)):
                repair = "name the folder of the class folders, or read another set of classes with folder:."
                if not isinstance(classes, Classes):
                    repair = "complete the file, or add ?classes=none to number the folders themselves."
                raise ConfigError(
                    f"{shown} has {len(unknown)} class folders that its classes file does not name, such as "
                    f"{unknown[0]!r}: {repair}"
                )
            self._labels = torch.tensor([table.numbers[label] for label in labels], dtype=torch.int64)
        warnings = []
        if isinstance(self._images, ZipReader) and self._images.skipped:
            skipped = self._images.skipped
            warnings.append(f"{self._images.path.name}: {len(skipped)} unsafe members left out, first {skipped[0]!r}")
        captioned = np.array([self._says_something(i, keep) for i in range(len(images))], dtype=np.bool_)
        super().__init__(shown, self._files, keep=keep, captioned=captioned, class_names=names, warnings=warnings)

    def _says_something(self, entry: int, keep: SampleFilter) -> bool:
        if not keep.require_captions or not self._text_files(entry):
            return not keep.require_captions
        try:
            return bool(self._record(entry).captions)
        except (Unusable, OSError):
            return True  # bad, which its reading will say

    def _text_files(self, entry: int) -> dict[str, str]:
        stem = _stem(self._files[entry])
        return {kind: f"{stem}.{kind}" for kind, has in self._has.items() if has.numpy()[entry]}

    def _record(self, entry: int) -> Record:
        texts = {kind: self._images.read(file) for kind, file in self._text_files(entry).items()}
        record = read_record(texts, pools=self._pools)[0]
        label = record.label if self._labels is None else int(self._labels[entry])
        return replace(record, label=label)

    def _image(self, entry: int) -> bytes:
        return self._images.read(self._files[entry])

    def _contents(self) -> Iterable[str]:
        """Of every file its size; in a zip its checksum too."""
        texts = {
            f"{_stem(self._files[i])}.{kind}"
            for kind, has in self._has.items()
            for i in has.nonzero().flatten().tolist()
        }
        for file in (*self._files, *sorted(texts)):
            if isinstance(self._images, ZipReader):
                yield f"{file}\0{self._images.members[file]}\0{self._images.checksums[file]}"
            else:
                path = self._images.path / file
                yield f"{file}\0{path.stat().st_size if path.exists() else -1}"


def list_files(root: Path) -> Iterator[str]:
    """Paths below `root`, links followed, hidden files and folders left out; a link back up is not followed twice."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = Path(folder).relative_to(root).as_posix()
        yield from (name if inside == "." else f"{inside}/{name}" for name in files if not name.startswith("."))


def _stem(file: str) -> str:
    return file.rpartition(".")[0]


def _class_folders(name: str, images: list[str]) -> list[str] | None:
    """The class folder of every image; None where images lie in no class folder."""
    parts = [image.split("/") for image in images]
    depth = 0
    while (
        parts
        and len({tuple(path[: depth + 1]) for path in parts}) == 1
        and all(len(path) > depth + 2 for path in parts)
    ):
        depth += 1  # one folder around everything that holds no image itself
    flat = [path for path in parts if len(path) == depth + 1]
    if not flat:
        return [path[depth] for path in parts]
    if len(flat) < len(parts):
        nested = next(image for image, path in zip(images, parts, strict=True) if len(path) > depth + 1)
        raise ConfigError(
            f"{name} holds images ({flat[0][-1]!r}) and folders of images ({nested!r}): name the folder whose "
            "subfolders are the classes, or the one that holds the images."
        )
    return None


def _find_classes(images: Folder | ZipReader, classes: Classes | str | None) -> Classes | None:
    if classes == "none":
        return None
    if classes is not None:
        return classes if isinstance(classes, Classes) else read_classes(classes)
    if images.has(CLASSES_FILE):
        return parse_classes(images.read(CLASSES_FILE), CLASSES_FILE)
    beside = images.path.parent / CLASSES_FILE
    return parse_classes(beside.read_bytes(), CLASSES_FILE) if beside.is_file() else None


def _number(names: list[str]) -> Classes:
    return Classes(tuple(names), {name: number for number, name in enumerate(names)})

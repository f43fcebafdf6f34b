"""From a folder, a file or a source's name to sources by role, by names alone: nothing is opened."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cmapkd.config import ConfigError
from cmapkd.data.kinds import BY_SUFFIX, kind_of, refuse_unknown_kind
from cmapkd.data.open import KINDS, split_of
from cmapkd.data.places import nearest
from cmapkd.data.reading import is_image_name

Roles = dict[str, str]
"""Sources by role: `train`, and `val` and `test` where their names say so."""

_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
_TABLES = {
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl",),
    "parquet": (".parquet",),
    "webdataset": (".tar",),
    "folder": (".zip",),
}
_SEVERAL = ("parquet", "webdataset")  # kinds that read several files as one source
_METADATA = "metadata.jsonl"


def find_sources(path: str | Path) -> Roles:
    """The sources at `path`, or the one that it names, as `csv:table.csv?csv_img_key=picture` does.

    Raises:
        ConfigError: there is nothing there that cmapkd reads, or several tables whose roles no name tells.
    """
    if not Path(path).exists() and (":" in str(path) or kind_of(str(path)) in KINDS):
        return _named(str(path))
    path = Path(path)
    if path.is_file():
        kind = BY_SUFFIX.get(path.suffix.lower())
        if kind is None:
            raise ConfigError(
                f"{path} is no kind of file that cmapkd reads: {', '.join(BY_SUFFIX)}. docs/data.md has them all."
            )
        return {"train": f"{kind}:{path}"}
    if not path.is_dir():
        raise ConfigError(f"there is no file or folder {str(path)!r}. {nearest(str(path))}")
    for found in (*_tables(path), _coco(path), _karpathy(path), _folders(path)):
        if found:
            return found
    raise ConfigError(
        f"{path} holds nothing that cmapkd reads: no pictures, no csv, jsonl, parquet or tar files, no COCO captions. "
        "docs/data.md shows the layouts."
    )


def _named(source: str) -> Roles:
    """A source as it is named; where its kind has splits and none is named, its `val` is what that role reads."""
    refuse_unknown_kind(source, KINDS)
    if split_of(source) is None and split_of(source, default="val") is not None:
        return {"train": source, "val": source}
    return {"train": source}


def _tables(folder: Path) -> Iterator[Roles]:
    for kind, suffixes in _TABLES.items():
        files = sorted(each for each in folder.iterdir() if each.suffix.lower() in suffixes and each.is_file())
        files = [each for each in files if each.name != _METADATA]
        if files:
            yield _by_role(folder, kind, files)


def _by_role(folder: Path, kind: str, files: Sequence[Path]) -> Roles:
    """Files by what their names say of their role.

    Raises:
        ConfigError: they say nothing, and there are several.
    """
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_role(file.stem) or "", []).append(file)
    if "train" not in groups:
        if len(groups) > 1 or (len(files) > 1 and kind not in _SEVERAL):
            names = ", ".join(file.name for file in files[:6])
            raise ConfigError(f"{folder} holds {names}, and no name says which is for training: name one file")
        groups = {"train": [*files]}
    several = [f"{role} ({len(found)} files)" for role, found in groups.items() if role and len(found) > 1]
    if several and kind not in _SEVERAL:
        raise ConfigError(f"{folder} holds several {kind} files for {', '.join(several)}: name the one for training")
    return {role: f"{kind}:{_pattern(folder, found)}" for role, found in groups.items() if role}


def _role(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), None)


def _pattern(folder: Path, files: Sequence[Path]) -> str:
    """One file, or a glob over several of one beginning.

    Raises:
        ConfigError: a glob over them would take in others.
    """
    if len(files) == 1:
        return str(files[0])
    start = os.path.commonprefix([file.name for file in files])  # noqa: RUF071  of names, whose characters count
    pattern = f"{glob.escape(start)}*{files[0].suffix}"
    if taken := {*folder.glob(pattern)} - {*files}:
        names, others = (", ".join(sorted(file.name for file in group)[:4]) for group in (files, taken))
        raise ConfigError(
            f"{folder}: {names} belong together, but no pattern of names has them without {others}: move them into a "
            "folder of their own"
        )
    return str(folder / pattern)


def _coco(folder: Path) -> Roles:
    """COCO as it is downloaded: `captions_train2017.json`, in the folder or in `annotations`, and `train2017`."""
    found: Roles = {}
    for captions in sorted((*folder.glob("captions_*.json"), *folder.glob("annotations/captions_*.json"))):
        images = folder / captions.stem.removeprefix("captions_")
        role = _role(captions.stem)
        if role and images.is_dir():
            found.setdefault(role, f"coco:{captions},{images}")
    return found if "train" in found else {}


def _karpathy(folder: Path) -> Roles:
    """Karpathy's JSON, whose one file has all splits, and the one folder of pictures beside it."""
    files = sorted(folder.glob("dataset_*.json"))
    images = [each for each in sorted(folder.iterdir()) if each.is_dir() and _has_images(each)]
    if len(files) != 1 or len(images) != 1:
        return {}
    return {role: f"coco:{files[0]},{images[0]}@{role}" for role in ("train", "val", "test")}


def _folders(folder: Path) -> Roles:
    """Folders of pictures by role, or the folder itself."""
    by_role: Mapping[str, Path] = {
        role: each
        for each in sorted(folder.iterdir(), reverse=True)
        if each.is_dir() and (role := _WORDS.get(each.name.lower())) and _has_images(each)
    }
    if "train" in by_role:
        return {role: f"folder:{by_role[role]}" for role in ("train", "val", "test") if role in by_role}
    return {"train": f"folder:{folder}"} if _has_images(folder) else {}


def _has_images(folder: Path) -> bool:
    return any(is_image_name(name) for _, _, files in os.walk(folder) for name in files)

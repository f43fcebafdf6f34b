"""A folder that is there whole or not at all, and the manifest of what is in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from cmapkd.config import ConfigError, DiskError
from cmapkd.config.disk import FULL, READ_ONLY, error_number, flush, usual_rights

MANIFEST = "export.json"


def refuse_existing(out: Path) -> None:
    """Raises:
    ConfigError: something is there.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} is there already: name a new folder, or remove that one")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder to write into, which gets the name `out` at the end; after an error nothing is left of it.

    Raises:
        ConfigError: `out` is there already.
        DiskError: the disk is full or may not be written.
    """
    refuse_existing(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.writing")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        usual_rights(file for file in temporary.rglob("*") if file.is_file())
        for file in temporary.rglob("*"):
            flush(file)
        refuse_existing(out)
        temporary.rename(out)
        flush(out.parent)
    except Exception as error:
        number = error_number(error)
        if number in FULL:
            raise DiskError(f"the disk of {out} is full: free some space and export again; nothing is left") from error
        if number in READ_ONLY:
            raise DiskError(f"{out} cannot be written ({os.strerror(number)}): name another folder") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """`export.json`: `content`, and of every other file its size and SHA-256."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": 1, **content, "files": files})


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

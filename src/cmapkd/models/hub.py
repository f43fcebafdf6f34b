"""The Hugging Face hub, asked only where it can answer: without a network its client tries for most of a minute."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cmapkd.config import ConfigError

PATIENCE = 0.9  # seconds to connect, and again to answer


def hub_options() -> dict[str, Any]:
    """Options of transformers' `from_pretrained`: only what is on this machine, where the hub cannot be reached."""
    return {} if hub_answers() else {"local_files_only": True}


def locate(rest: str, *, where: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """The folder or hub id that stands behind `hf:`, and the options with which `from_pretrained` fetches it.

    Args:
        where: the whole name, for messages.
        revision: commit or branch of a hub repository.
    Raises:
        ConfigError: it looks like a folder and there is none; or a revision of a folder is asked for.
    """
    source = str(Path(rest).expanduser()) if rest.startswith("~") else rest
    local = Path(source).is_dir()
    if not local and (rest.startswith((".", "/", "~")) or rest.count("/") > 1):
        raise ConfigError(f"{where}: there is no folder {source}")
    if local and revision is not None:
        raise ConfigError(f"{where} is a local folder: option revision is for hub repositories only")
    return source, {} if local else {**({} if revision is None else {"revision": revision}), **hub_options()}


def hub_answers() -> bool:
    """Whether the hub can be reached, by the proxies that its client uses; at once no where it is set offline."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of two HTTP libraries, by the client's version
        return False
    return True


def cached_folder(repository: str, files: Iterable[str]) -> Path | None:
    """Where the hub's cache on this machine keeps a repository that has one of these files; None where it does not."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # no name that a repository can have
        for file in files:
            found = try_to_load_from_cache(repository, file)
            if isinstance(found, str):
                return Path(found).parent
    return None


def file_beside(source: str, file: str, fetching: dict[str, Any]) -> Path | None:
    """A further file of a folder or of a hub repository; None where it has no such file.

    Args:
        source, fetching: as `locate` gives them.
    Raises:
        LookupError: the file was never fetched, and the hub cannot be asked now.
    """
    if Path(source).is_dir():
        path = Path(source) / file
        return path if path.is_file() else None
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, file, **fetching))
    except LocalEntryNotFoundError:
        if try_to_load_from_cache(source, file, revision=fetching.get("revision")) is _CACHED_NO_EXIST:
            return None
        raise LookupError(f"{file} of {source}") from None
    except EntryNotFoundError:
        return None

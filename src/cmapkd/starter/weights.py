"""Whether the weights of a teacher are on this machine; nothing is loaded, and no network is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmapkd.models.hub import cached_folder
from cmapkd.models.packaged import packaged_models

_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # of a repository that open_clip reads
_NATIVE = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")  # of transformers


def weights_said(name: str) -> str | None:
    """A sentence on where the weights of a model are; None where its name does not tell.

    Args:
        name: as recipes name a model: `open_clip:ViT-B-32/openai`, `hf:openai/clip-vit-base-patch32`, a folder.
    """
    family, _, rest = name.partition(":")
    if Path(name).is_dir() or Path(rest).expanduser().is_dir() or (family == "tiny" and rest in packaged_models()):
        here: bool | None = True
    elif family == "open_clip":
        here = _open_clip(rest)
    else:
        here = cached_folder(rest, _NATIVE) is not None if family == "hf" else None
    if here is None:
        return None
    if here:
        return f"teacher: the weights of {name} are on this machine"
    return f"teacher: the weights of {name} are not on this machine; doctor or distill downloads them when first run"


def _open_clip(rest: str) -> bool | None:
    import open_clip

    name, _, tag = rest.partition("/")
    entry: dict[str, Any] = (open_clip.get_pretrained_cfg(name, tag) or {}) if tag else {}
    if not entry:  # random weights, or no such name: building it says so
        return None
    repository, _, file = str(entry.get("hf_hub") or "").rpartition("/")
    if repository and cached_folder(repository, (*filter(None, [file]), *_FILES)) is not None:
        return True
    url = str(entry.get("url") or "")
    return bool(url) and (Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]).is_file()

"""Model folders: safetensors for tensors, JSON for the architecture, nothing that runs code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from cmapkd.config.disk import usual_rights
from cmapkd.config.leaves import leaves
from cmapkd.models.weight_files import read_weights

__all__ = [
    "DESCRIPTION",
    "WEIGHTS",
    "check_sizes",
    "load_weights",
    "read_description",
    "read_weights",
    "write_model_folder",
    "write_tensors",
]

DESCRIPTION = "cmapkd.json"  # family, name and options of the model in a folder
WEIGHTS = "model.safetensors"

MAX_LAYERS = 1000
MAX_WIDTH = 65_536
MAX_SIZE = 10_000_000  # of anything else that a config counts: vocabularies, pixels, places
MAX_BASE = 10**30  # of rotary positions: a number that only enters a formula, 1e9 in models of long contexts
_LIMITS = (  # by words in a key
    (("theta", "base_freq"), MAX_BASE),
    (("layers", "depth"), MAX_LAYERS),
    (("width", "dim", "hidden"), MAX_WIDTH),
)


def check_sizes(config: Mapping[str, Any], *, where: str | Path) -> None:
    """Refuses a model config, of whatever library, whose numbers no model has: building it would take all memory, or
    years.

    Raises:
        ValueError: names the key.
    """
    for path, value in leaves(config):
        last = path.rpartition(".")[2]
        most = next((limit for words, limit in _LIMITS if any(word in last for word in words)), MAX_SIZE)
        if isinstance(value, int | float) and not abs(value) <= most:  # NaN as well
            raise ValueError(f"{where}: {path} is {str(value)[:40]}, more than any model has (limit {most:,})")


def write_model_folder(
    folder: Path, *, family: str, name: str, options: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the description, and the weights unless the family's own library writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    description = {"format": 1, "family": family, "name": name, "options": dict(options)}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if weights is not None:
        write_tensors(folder / WEIGHTS, weights)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that others may read as they may read any new file: the library's own is for the owner."""
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
    usual_rights([path])


def read_description(folder: Path) -> dict[str, Any]:
    """The description in a model folder.

    Raises:
        ValueError: there is none, or it is not one of ours.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a cmapkd model folder: it has no {DESCRIPTION}. Give a run's student/ folder, or name "
            f"the library that wrote it: hf:{folder} or open_clip:{folder}."
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        format_number = description["format"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable model description: {error}") from None
    if format_number != 1:
        raise ValueError(f"{path} has format {str(format_number)[:40]}, this version reads format 1: update cmapkd.")
    if not isinstance(description.get("options"), dict) or not {"family", "name"} <= description.keys():
        raise ValueError(f"{path} is not a readable model description: it lacks family, name or options")
    check_sizes(description["options"], where=path)
    return dict(description)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, where: str | Path) -> None:
    """Copies `weights` into `model`, every one of them and nothing else. A tensor that two names share is needed once.

    Raises:
        ValueError: names are missing or unexpected, or a shape differs; lists the first few with both shapes.
    """
    own = model.state_dict(keep_vars=True)
    weights = _with_shared(own, weights)
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    wrong = [
        f"{key}: file {tuple(weights[key].shape)}, model {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if weights[key].shape != own[key].shape
    ]
    if missing or unexpected or wrong:
        problems = [
            f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(wrong)))
            if names
        ]
        raise ValueError(
            f"the weights in {where} do not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Name the architecture that they were trained with."
        )
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in weights.items()})


def _with_shared(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under each name of their tensor, as the table of words that is the head too."""
    given = {id(own[name]): weights[name] for name in own.keys() & weights.keys()}
    shared = {name: given[id(tensor)] for name, tensor in own.items() if id(tensor) in given}
    return {**shared, **weights}

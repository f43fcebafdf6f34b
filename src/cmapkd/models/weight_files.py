"""Tensors out of weight files that others wrote: safetensors, or a training script's torch checkpoint. Nothing is run.

A torch file is read by torch's restricted loader alone. It may hold tensors, plain containers and numpy scalars.
"""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # what training scripts keep the weights under
_AVERAGED = ("state_dict_ema", "model_state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
_COMPILED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch's own wrappers, at any depth
_COUNT = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


def read_weights(path: str | Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """Tensors of a weight file: `.safetensors`, or a torch file that loads with `weights_only=True`.

    Names lose the wrappers that DDP, `torch.compile` and FSDP put in front of them, in any order.

    Args:
        averaged: the moving average that a training script kept beside the weights, in place of the weights.
    Raises:
        ValueError: missing, truncated, without the weights that were asked for, or it holds objects other than
            tensors and numbers; says how to convert this file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weight file {path}")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, averaged=averaged)
    keys, found = _find(loaded, averaged=averaged)
    if averaged and not any(key in _AVERAGED for key in keys):
        raise ValueError(
            f"{path} holds no moving average of its weights: looked for {', '.join(_AVERAGED)} among {_names(loaded)}. "
            "Leave out `weights: ema`."
        )
    if not _is_state_dict(found):
        if other := [key for key in _AVERAGED if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping)]:
            raise ValueError(f"{path} holds no weights but their moving average ({other[0]}): set `weights: ema`.")
        raise ValueError(
            f"{path} holds no plain state dict, but {_names(loaded)}: save model.state_dict() as safetensors."
        )
    weights = {_unwrapped(key): value for key, value in found.items()}
    if len(weights) < len(found):
        raise ValueError(f"{path} has the same weight twice, with and without a wrapper's prefix: keep one of them.")
    return {key: value for key, value in weights.items() if key != _COUNT}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): copy or export it again.") from None


def _read_torch(path: Path, *, averaged: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        with path.open("rb") as file:
            begins = file.read(2)
        if not begins.startswith((b"PK", b"\x80")) or not _whole(path, begins):  # no archive and no pickle
            raise ValueError(
                f"{path} is damaged, or no weight file ({type(error).__name__}): copy or download it again."
            ) from None
        objects = _other_objects(path)
        holds = f"holds Python objects ({_shown(objects)})" if objects else "is damaged, or holds Python objects"
        raise ValueError(
            f"{path} cannot be loaded safely ({type(error).__name__}): it {holds}, which can run code. If you trust "
            "its origin, convert it once where it was made, and name the new file as `checkpoint`: "
            f"{_conversion(path, objects, averaged=averaged)}"
        ) from None


def _whole(path: Path, begins: bytes) -> bool:
    """Whether an archive has its end, where its table of contents stands."""
    return begins != b"PK" or zipfile.is_zipfile(path)


def _numpy_scalars() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What a pickled numpy number names, in numpy 1 and in numpy 2. None of it runs anything."""
    scalar: Any = np.float64(0).__reduce__()[0]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDSU"]
    return [*names, (np.dtype, "numpy.dtype"), *dict.fromkeys(kinds)]


def _find(loaded: Any, *, averaged: bool) -> tuple[list[str], Any]:
    """The keys that lead to the weights, and what stands there."""
    keys: list[str] = []
    while isinstance(loaded, Mapping):
        wrappers = (*(_AVERAGED if averaged and not keys else ()), *_WRAPPERS)
        key = next((key for key in wrappers if isinstance(loaded.get(key), Mapping | _Object)), None)
        if key is None:
            break
        keys.append(key)
        loaded = loaded[key]
    return keys, loaded


def _is_state_dict(found: Any) -> bool:
    return isinstance(found, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    )


def _unwrapped(name: str) -> str:
    """A parameter's name without the wrappers' prefixes. `module` is dropped in front only: a model may have one."""
    words = [word for word in name.split(".") if word not in _COMPILED]
    while len(words) > 1 and words[0] == "module":
        words = words[1:]
    return ".".join(words)


def _names(loaded: Any) -> str:
    if not isinstance(loaded, Mapping):
        return f"a {type(loaded).__name__}"
    names = [str(key) for key in loaded]
    return f"the keys {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "nothing"


def _shown(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


class _Object:
    """Stands for an object of a class that is not imported, where only a file's keys are read."""

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def _other_objects(path: Path) -> list[str]:
    """Names of the classes and functions in a torch file that are neither tensors nor numbers; empty: not known."""
    with suppress(Exception), torch.serialization.safe_globals(_numpy_scalars()):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return []


def _conversion(path: Path, objects: Sequence[str], *, averaged: bool) -> str:
    """The line that turns this very file into safetensors."""
    keys: list[str] = ["state_dict"]
    whole = False  # the module itself was saved, not its weights
    with suppress(Exception):
        stand_ins: list[Any] = [(_Object, name) for name in objects]
        with torch.serialization.safe_globals([*_numpy_scalars(), *stand_ins]):
            loaded = torch.load(path, map_location="meta", weights_only=True)  # reads no weights
        keys, found = _find(loaded, averaged=averaged)
        whole = isinstance(found, _Object)
    place = "".join(f"[{json.dumps(key)}]" for key in keys) + (".state_dict()" if whole else "")
    source, target = (json.dumps(str(name)) for name in (path, path.with_suffix(".safetensors")))
    code = (
        "import torch; from safetensors.torch import save_file; "
        f'weights = torch.load({source}, map_location="cpu", weights_only=False){place}; '
        "save_file({name: value.clone().contiguous() for name, value in weights.items() if torch.is_tensor(value)}, "
        f"{target})"
    )
    return f"python -c {shlex.quote(code)}"

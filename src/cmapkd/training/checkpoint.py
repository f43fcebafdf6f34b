"""Checkpoints: everything an interrupted run needs to end bit-identical, written whole or not at all.

Tensors as safetensors, the rest as JSON. A checkpoint is written under a temporary name, flushed and renamed, and only
then is an older one deleted; the teacher is in none of them.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmapkd.cache.files import flush

Kind = Literal["step", "best"]  # to resume from; the best validated student


@dataclass
class Progress:
    """Where a run stands, besides its tensors."""

    step: int = 0  # steps done
    best_score: float | None = None
    best_step: int | None = None
    seconds: float = 0.0  # of training, over all sittings
    ledger: dict[str, Any] = field(default_factory=dict)  # counts of good and bad samples
    structure: dict[str, Any] = field(default_factory=dict)  # sizes that the method's modules have by now


def checkpoint_path(folder: Path, step: int, kind: Kind = "step") -> Path:
    return folder / f"{kind}-{step:09d}"


def list_checkpoints(folder: Path, kind: Kind = "step") -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = folder.glob(f"{kind}-*") if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and path.name.removeprefix(f"{kind}-").isdigit())


def write_checkpoint(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], progress: Progress) -> None:
    """Writes one safetensors file for each entry of `tensors` and the progress, then renames the folder into place."""
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, group in tensors.items():
        own = {key: value.detach().cpu().contiguous().clone() for key, value in group.items()}
        save_file(own, temporary / f"{name}.safetensors")
    (temporary / "progress.json").write_text(json.dumps(vars(progress), indent=2) + "\n", encoding="utf-8")
    for file in temporary.iterdir():
        flush(file)
    if path.exists():  # written before the interruption that led here, with the same content
        shutil.rmtree(path)
    temporary.rename(path)
    flush(path.parent)


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], Progress]:
    """The tensors by file name, and the progress.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        progress = Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
        return {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}, progress
    except (OSError, TypeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None


def remove_old(folder: Path, *, keep: int, kind: Kind = "step") -> None:
    """Deletes all but the newest `keep` checkpoints."""
    for path in list_checkpoints(folder, kind)[:-keep]:
        shutil.rmtree(path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: `<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value) for number, entry in state.items() for name, value in entry.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` took; learning rates are not part of it, they follow from the step."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_tensors() -> dict[str, Tensor]:
    """This process's random state: torch on the CPU and on every GPU, and Python's own."""
    version, numbers, gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "python": torch.tensor([version, *numbers], dtype=torch.int64)}
    if gauss is not None:
        tensors["python_gauss"] = torch.tensor(gauss, dtype=torch.float64)
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def load_random(tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `random_tensors` took."""
    torch.set_rng_state(tensors["torch"])
    version, *numbers = tensors["python"].tolist()
    gauss = tensors["python_gauss"].item() if "python_gauss" in tensors else None
    random.setstate((version, tuple(numbers), gauss))
    if torch.cuda.is_available():
        states = [tensors[key] for key in sorted(tensors) if key.startswith("cuda")]
        if len(states) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states)

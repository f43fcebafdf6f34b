"""Checkpoints: everything an interrupted run needs to end bit-identical, written whole or not at all.

Tensors as safetensors, the rest as JSON, and the checksum of every file. A checkpoint is written under a temporary
name, flushed and renamed, and only then is an older one deleted; the teacher is in none of them. One that is damaged is
put aside, and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmapkd.config import writing
from cmapkd.config.disk import DiskError, flush, usual_rights
from cmapkd.training.shards import FILES, read_whole

_PROGRESS, _CHECKSUMS = "progress.json", "checksums.json"
_WRITING, _REPLACED, _REMOVED = ".writing", ".replaced", ".removed"
_ALL = slice(None)

Kind = Literal["step", "best"]  # to resume from; the best validated student
KINDS: tuple[Kind, ...] = ("step", "best")

Contents = dict[str, dict[str, str]]
"""What a run is made of, by the setting that names it: `at`, where it was, and `holds`, what was there, in words."""


class CheckpointWarning(UserWarning):
    """The newest checkpoint is damaged, and the run goes on from an earlier one."""


@dataclass
class Progress:
    """Where a run stands, besides its tensors."""

    step: int = 0  # steps done
    best_score: float | None = None
    best_step: int | None = None
    seconds: float = 0.0  # of training, over all sittings
    parts: dict[str, float] = field(default_factory=dict)  # of these seconds, those of what is told apart
    ledger: dict[str, Any] = field(default_factory=dict)  # counts of good and bad samples
    structure: dict[str, Any] = field(default_factory=dict)  # sizes that the method's modules have by now
    total: int = 0  # steps that the run was to have; 0: a checkpoint of a version that did not say
    extended: list[dict[str, int]] = field(default_factory=list)  # `at` which step it was prolonged, `from` how many
    contents: Contents = field(default_factory=dict)  # that it was trained with; empty: of such a version

    def add_part(self, name: str, seconds: float) -> None:
        self.parts[name] = self.parts.get(name, 0.0) + seconds


def checkpoint_path(folder: Path, step: int, kind: Kind = "step") -> Path:
    return folder / f"{kind}-{step:09d}"


def list_checkpoints(folder: Path, kind: Kind = "step") -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = folder.glob(f"{kind}-*") if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and path.name.removeprefix(f"{kind}-").isdigit())


def write_checkpoint(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], progress: Progress) -> None:
    """Writes one safetensors file for each entry of `tensors`, the progress and all checksums, then renames the folder
    into place.

    Raises:
        DiskError: the disk is full or read-only; what was there before is as it was.
    """
    with writing(path.parent):
        temporary = begin(path)
        try:
            write_groups(temporary, tensors)
            checksums = {file.name: checksum(file) for file in sorted(temporary.iterdir())}
            for file in temporary.iterdir():
                flush(file)
            complete(path, progress, checksums)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def begin(path: Path) -> Path:
    """The empty folder in which the checkpoint `path` is written."""
    temporary = begun(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def begun(path: Path) -> Path:
    """The folder that `begin` makes."""
    return path.with_name(f".{path.name}{_WRITING}")


def write_groups(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """One safetensors file for each entry."""
    for name, group in tensors.items():
        save_file(_apart(group), folder / f"{name}.safetensors")
    usual_rights(folder.iterdir())


def complete(path: Path, progress: Progress, checksums: Mapping[str, str]) -> None:
    """Ends what `begin` began: the progress, all checksums, and the rename.

    Args:
        checksums: of the files that are there, which are on the disk by now.
    """
    temporary = begun(path)
    if absent := [name for name in checksums if not (temporary / name).is_file()]:
        raise DiskError(f"{temporary} has no {', '.join(absent)}: its processes do not write into one folder")
    told = temporary / _PROGRESS
    told.write_text(json.dumps(vars(progress), indent=2) + "\n", encoding="utf-8")
    known = {**checksums, told.name: checksum(told)}
    (temporary / _CHECKSUMS).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    for file in (told, temporary / _CHECKSUMS):
        flush(file)
    flush(temporary)
    before = path.with_name(f".{path.name}{_REPLACED}")
    if path.exists():  # from before the interruption that led here
        if before.exists():  # of a kill during an earlier replacement
            shutil.rmtree(before)
        path.rename(before)  # a kill between the two renames loses nothing
    temporary.rename(path)
    flush(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def _apart(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the host, each with memory of its own: safetensors writes no tensors that share some."""
    found, known = {}, set()
    for key, value in group.items():
        there = value.detach().cpu().contiguous()
        storage = there.untyped_storage()
        if storage.nbytes() != there.nbytes or storage.data_ptr() in known:
            there = there.clone()
        known.add(storage.data_ptr())
        found[key] = there
    return found


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], Progress]:
    """The tensors by group, whole, and the progress: exactly what was written, in whichever form.

    Raises:
        ValueError: a file is missing, or a bit of one differs.
    """
    try:
        if (reason := damage(path)) is not None:
            raise ValueError(reason)
        return _contents(path)
    except (OSError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None


def _contents(path: Path) -> tuple[dict[str, dict[str, Tensor]], Progress]:
    return read_tensors(path), progress_of(path)


def damage(path: Path, *, part: slice = _ALL) -> str | None:
    """Why a checkpoint is not what was written; None: it is.

    Args:
        part: of its files, in their order; others are not read.
    """
    try:
        checksums = json.loads((path / _CHECKSUMS).read_bytes())
        if not isinstance(checksums, dict):
            return f"{_CHECKSUMS} is damaged"
        for file in sorted({*checksums, *(file.name for file in path.iterdir())} - {_CHECKSUMS})[part]:
            if file not in checksums:
                return f"{file} does not belong to it"
            if checksum(path / file, like=checksums[file]) != checksums[file]:
                return f"{file} is damaged (its checksum does not fit)"
        progress_of(path)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        return str(error)
    return None


def read_tensors(path: Path) -> dict[str, dict[str, Tensor]]:
    """Every tensor whole, by group. Nothing is checked here."""
    shares = {*path.glob(FILES)}
    groups = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors")) if file not in shares}
    return groups | read_whole(path) if shares else groups


def read_group(path: Path, name: str) -> dict[str, Tensor] | None:
    """One of the groups that were written whole; None where there is none of this name."""
    file = path / f"{name}.safetensors"
    return load_file(file) if file.is_file() else None


def progress_of(path: Path) -> Progress:
    return Progress(**json.loads((path / _PROGRESS).read_bytes()))


def read_progress(folder: Path) -> Progress | None:
    """The progress of the newest checkpoint that tells it, without its tensors; None where there is none."""
    for path in reversed(list_checkpoints(folder)):
        with suppress(OSError, TypeError, ValueError, KeyError, RecursionError):
            known = json.loads((path / _CHECKSUMS).read_bytes())[_PROGRESS]
            if checksum(path / _PROGRESS, like=known) == known:
                return progress_of(path)
    return None


def read_latest(folder: Path) -> tuple[dict[str, dict[str, Tensor]], Progress] | None:
    """The newest checkpoint that is whole; None where there is none at all. Damaged ones are told of in a warning.

    Raises:
        ValueError: there are some, and none is whole.
    """
    path = newest_whole(folder, list_checkpoints(folder))
    return None if path is None else _contents(path)


def newest_whole(
    folder: Path, listed: Sequence[Path], damaged: Callable[[Path], str | None] = damage, *, tell: bool = True
) -> Path | None:
    """The newest checkpoint that is whole; None where there is none at all. Damaged ones are told of in a warning.

    Args:
        listed: the checkpoints of the folder, oldest first.
        damaged: why one is not whole; None: it is.
        tell: whether this process warns.
    Raises:
        ValueError: there are some, and none is whole.
    """
    reasons: list[str] = []
    for path in reversed(listed):
        if (reason := damaged(path)) is not None:
            reasons.append(f"checkpoint {path} cannot be read: {reason}")
            continue
        if reasons and tell:
            warnings.warn(f"{'; '.join(reasons)}. Going on from {path.name} instead.", CheckpointWarning, stacklevel=2)
        return path
    if reasons:
        raise ValueError(
            f"none of the {len(reasons)} checkpoints in {folder} is whole ({reasons[0]}): restore one from a copy, or "
            "begin anew in another folder"
        )
    return None


def put_in_order(folder: Path, progress: Progress) -> None:
    """Makes the folder what it was after `progress`: what a kill left half done is finished or removed, damaged step
    checkpoints later than it no longer count, and its best checkpoint is one that is there. For one process alone."""
    for path in list_checkpoints(folder):
        if int(path.name.rpartition("-")[2]) > progress.step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    # `restore_replaced` ran before: what still has a replaced name stands in its new form under the old one
    for end in (_WRITING, _REMOVED, _REPLACED):
        for path in folder.glob(f".*{end}"):
            shutil.rmtree(path, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Puts back what a kill left under another name while it was being replaced. For one process alone."""
    for path in folder.glob(f".*{_REPLACED}") if folder.is_dir() else ():
        if not (home := path.with_name(path.name[1 : -len(_REPLACED)])).exists():
            path.rename(home)


def find_best(folder: Path, progress: Progress) -> None:
    """The best checkpoint that `progress` knows may have been replaced by a better one of later steps, which a kill, or
    damage, has set the run back from: then that one is the best so far."""
    if progress.best_step is None or checkpoint_path(folder, progress.best_step, "best").is_dir():
        return
    progress.best_score = progress.best_step = None
    for path in reversed(list_checkpoints(folder, "best")):
        try:
            _, later = read_checkpoint(path)
        except ValueError:
            continue
        progress.best_score, progress.best_step = later.best_score, later.best_step
        return


def remove_old(folder: Path, *, keep: int, kind: Kind = "step") -> None:
    """Deletes all but the newest `keep` checkpoints. One that is half deleted no longer looks like one."""
    for path in list_checkpoints(folder, kind)[: -keep or None]:
        leaving = path.with_name(f".{path.name}{_REMOVED}")
        path.rename(leaving)
        shutil.rmtree(leaving)


def remove_finished(folder: Path, *, keep: int) -> None:
    """Leaves of a finished run what is needed to prolong it: the newest `keep` checkpoints, and the best with them."""
    if not folder.is_dir():
        return
    with writing(folder.parent):
        remove_old(folder, keep=keep)
        if not keep:
            remove_old(folder, keep=0, kind="best")
            if not any(folder.iterdir()):
                folder.rmdir()


def checksum(file: Path, *, like: Any = None) -> str:
    """SHA-256, for which processors have instructions; of earlier versions' checkpoints BLAKE2b.

    Args:
        like: the checksum that it is compared with, whose length tells which.
    """
    of_before = isinstance(like, str) and len(like) == 2 * _BEFORE
    with file.open("rb") as opened:
        if of_before:
            return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=_BEFORE)).hexdigest()
        return hashlib.file_digest(opened, "sha256").hexdigest()


_BEFORE = 16  # bytes of a checksum of earlier versions


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
    numbered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, entry in state.items():
        shapes = {value.shape for value in entry.values() if value.ndim}
        if place >= len(numbered) or not shapes <= {numbered[place].shape}:
            raise ValueError(
                f"the checkpoint's optimizer state of parameter {place} does not fit this run, in which other "
                "parameters learn: resume with the settings that the run was started with"
            )
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_tensors() -> dict[str, Tensor]:
    """This process's random state: torch on the CPU and on the process's own GPU, and Python's own."""
    version, numbers, gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "python": torch.tensor([version, *numbers], dtype=torch.int64)}
    if gauss is not None:
        tensors["python_gauss"] = torch.tensor(gauss, dtype=torch.float64)
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def load_random(tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `random_tensors` took."""
    torch.set_rng_state(tensors["torch"])
    version, *numbers = tensors["python"].tolist()
    gauss = tensors["python_gauss"].item() if "python_gauss" in tensors else None
    random.setstate((version, tuple(numbers), gauss))
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])

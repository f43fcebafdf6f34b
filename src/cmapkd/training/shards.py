"""Checkpoints of which every process writes its share: PyTorch's distributed checkpoint, kept in safetensors files.

Its usual form has a pickle beside the tensors. The form that is read and written here has none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cmapkd.config.disk import DiskError

if TYPE_CHECKING:  # a run whose checkpoints are whole does not wait for its import
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

FILES = "shard-*.safetensors"
Groups = dict[str, dict[str, Tensor]]


def has_shares(folder: Path) -> bool:
    """Whether a checkpoint was written in shares."""
    return any(folder.glob(FILES))


class HostShares:
    """Copies of this process's shares on the host; those of tensors on a GPU are pinned and used again."""

    def __init__(self) -> None:
        self._stager: Any = None
        self._known: Any = None

    def of(self, groups: Mapping[str, Mapping[str, Any]], *, main: bool) -> dict[str, Any]:
        """The tensors as they are now, by `GROUP/NAME`.

        Args:
            main: whether what every process has whole is this one's to write.
        """
        flat = {
            f"{group}/{name}": value
            for group, tensors in groups.items()
            for name, value in tensors.items()
            if main or isinstance(value, DTensor)
        }
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        sizes = tuple((name, value.shape, value.dtype, value.device) for name, value in flat.items())
        if sizes != self._known:
            on_gpu = any(value.is_cuda for value in flat.values())
            self._stager, self._known = BlockingAsyncStager(cache_staged_state_dict=on_gpu), sizes
        return dict(self._stager.stage(flat))


def write_share(folder: Path, shares: Mapping[str, Any], group: Any) -> list[Path]:
    """Writes this process's shares; every process of `group` must call it.

    Returns:
        The files of this process; none where it has no share.
    Raises:
        OSError: what a disk refused, of whichever process.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    planner = DefaultSavePlanner(flatten_state_dict=False)
    with _plain_errors():
        save(dict(shares), storage_writer=writer, planner=planner, process_group=group)
    return sorted(folder.glob(f"shard-{dist.get_rank(group) + 1:05d}-*.safetensors"))


def stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and type of each whole tensor, by `GROUP/NAME`, read from the heads of the files."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    # files beside the shares have tensors without a group: they are read otherwise
    return {name: entry for name, entry in found.items() if "/" in name and isinstance(entry, TensorStorageMetadata)}


def read_whole(folder: Path) -> Groups:
    """Every tensor put together, by group; for a process alone, or each for itself.

    Raises:
        ValueError: the shares do not make whole tensors.
    """
    flat = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored(folder).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        _load(flat, folder, no_dist=True)
    groups: Groups = {}
    for name, value in flat.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = value
    return groups


def read_shares(folder: Path, groups: Mapping[str, Mapping[str, Any]], group: Any) -> None:
    """Fills these tensors in place, each process its shares, whoever wrote them; every process must call it.

    Raises:
        ValueError: the checkpoint has other tensors, or a shape differs.
    """
    flat = {f"{kind}/{name}": value for kind, tensors in groups.items() for name, value in tensors.items()}
    found = stored(folder)
    if odd := sorted(flat.keys() ^ found.keys()):
        there = "lacks" if odd[0] in flat else "has"
        raise ValueError(
            f"checkpoint {folder} does not fit this run: it {there} {odd[0]} ({len(odd)} such tensors): resume with "
            "the settings that the run was started with"
        )
    for name, value in flat.items():
        if found[name].size != value.shape:
            raise ValueError(
                f"checkpoint {folder} does not fit this run: {name} is {tuple(found[name].size)} there and "
                f"{tuple(value.shape)} here"
            )
    _load(flat, folder, process_group=group)


def _load(tensors: dict[str, Any], folder: Path, **how: Any) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _plain_errors():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), **how)


def together(job: Callable[[], Any] | None, group: Any) -> list[Any]:
    """Does each process's job, if it has one; every process of `group` must call it.

    Returns:
        What the jobs gave, by rank.
    Raises:
        Exception: the job's own, where it failed.
        DiskError: that of another process failed.
    """
    failure: Exception | None = None
    given = None
    try:
        given = job() if job is not None else None
    except Exception as error:
        failure = error
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (given, None if failure is None else str(failure)), group=group)
    if failure is not None:
        raise failure
    for rank, (_, reason) in enumerate(told):
        if reason is not None:
            raise DiskError(f"process {rank} could not do its part of a checkpoint: {reason}")
    return [each for each, _ in told]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a process failed with, in place of the library's collection of all failures, which is no `Exception`."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise (first if isinstance(first, Exception) else ValueError(str(first))) from None

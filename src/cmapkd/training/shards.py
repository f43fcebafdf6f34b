"""Checkpoints of which every process writes its share: the safetensors form of PyTorch's distributed checkpoint.

Its reader finds the rows that a process needs, whoever wrote them. The library's usual form has a pickle beside the
tensors; this one has none. A share is written here and not by the library's writer, which holds the interpreter's lock
while it writes, and copies what is on the host once more.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmapkd.config.disk import DiskError, usual_rights
from cmapkd.models.shares import is_shared_out

if TYPE_CHECKING:  # a run whose checkpoints are whole does not wait for its import
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.tensor import DTensor

FILES = "shard-*.safetensors"
_PLACES = "DCP_SHARDING_INFO"  # in the head of a file, where the library looks for `saved_offsets`
Groups = dict[str, dict[str, Tensor]]
Places = dict[str, dict[str, list[int]]]
"""By `GROUP/NAME`, where this process's part of a tensor begins in the whole one, and the whole one's shape."""


def has_shares(folder: Path) -> bool:
    """Whether a checkpoint was written in shares."""
    return any(folder.glob(FILES))


def own_part(groups: Mapping[str, Mapping[str, Tensor]], *, main: bool) -> tuple[dict[str, Tensor], Places]:
    """What this process writes, by `GROUP/NAME`: its rows of what is shared out, and where they begin.

    Args:
        main: whether what every process has whole is this one's to write.
    """
    tensors: dict[str, Tensor] = {}
    places: Places = {}
    for group, named in groups.items():
        for name, value in named.items():
            local, start = (value.to_local(), _first_row(value)) if is_shared_out(value) else (value, 0)
            alike = not is_shared_out(value) or not value.numel()  # written once
            if main if alike else local.numel():
                begins = [start, *[0] * (local.dim() - 1)][: local.dim()]
                tensors[f"{group}/{name}"] = local
                places[f"{group}/{name}"] = {"saved_offsets": begins, "shape": [*value.shape]}
    return tensors, places


def _first_row(value: DTensor) -> int:
    """Where a process's rows begin: they are dealt out in equal blocks, of which the last ones may be shorter."""
    from torch.distributed.tensor import Shard

    if value.placements != (Shard(0),):
        raise ValueError(f"a tensor is shared out as {value.placements}, and only rows of one mesh can be written")
    block = -(-value.shape[0] // value.device_mesh.size())
    first = min(block * value.device_mesh.get_local_rank(), value.shape[0])
    rows = value.to_local().shape[0]
    if rows != min(block, value.shape[0] - first):
        raise ValueError(f"a process has {rows} rows of {value.shape[0]}, which are not dealt out in blocks of {block}")
    return first


def write_share(folder: Path, tensors: Mapping[str, Tensor], places: Places, rank: int) -> list[Path]:
    """Writes what `own_part` gave, once it is on the host.

    Returns:
        The file; none where there is nothing to write.
    Raises:
        DiskError: this process does not see the folder.
    """
    if not folder.is_dir():
        raise DiskError(
            f"process {rank} does not see {folder}: with training.checkpoint_form=shares every process writes there. "
            "Name a run folder that all machines share, or set training.checkpoint_form=whole"
        )
    if not tensors:
        return []
    path = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
    save_file(dict(tensors), path, metadata={_PLACES: json.dumps(places)})
    usual_rights([path])
    return [path]


def stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and type of each whole tensor, by `GROUP/NAME`, read from the heads of the files.

    Raises:
        ValueError: rows are missing.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    # files beside the shares have tensors without a group: they are read otherwise
    shared = {name: each for name, each in found.items() if "/" in name and isinstance(each, TensorStorageMetadata)}
    whole = _whole_shapes(folder)
    for name, entry in shared.items():
        parts, number = sum(chunk.sizes.numel() for chunk in entry.chunks), torch.Size(whole[name]).numel()
        if parts != number:
            raise ValueError(
                f"checkpoint {folder} has {parts:,} of the {number:,} numbers of {name}: a share is missing"
            )
    return shared


def _whole_shapes(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in folder.glob(FILES):
        with safe_open(path, framework="pt") as file:
            found |= {name: place["shape"] for name, place in json.loads(file.metadata()[_PLACES]).items()}
    return found


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

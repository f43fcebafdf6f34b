"""The processes of a run: how they start, and how they wait for one that is busy for long."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from cmapkd.config import ConfigError

PATIENCE = timedelta(days=30)  # a process that dies ends the waiting at once: its connections close
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun

_patient: tuple[Any, Any] | None = None  # all processes, and their group for waiting


def start_processes(*, on_cpu: bool) -> PartialState:
    """Joins the processes that a launcher started; every one must call it before any is busy for long.

    Raises:
        ConfigError: accelerate's own settings ask for FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError(
            "accelerate's settings ask for FSDP: here the recipe decides, with training.sharding=fsdp2. Launch without "
            "(distributed_type MULTI_GPU, no --use_fsdp)"
        )
    if was_restarted() and "RANK" in os.environ and not dist.is_initialized():
        _join_anew(on_cpu=on_cpu)
    state = PartialState(cpu=on_cpu)
    prepare_to_wait()
    return state


def prepare_to_wait() -> None:
    """Makes the group that `wait_for_all` waits in; every process must call it at about the same time."""
    global _patient
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    everyone = dist.group.WORLD
    assert everyone is not None
    if _patient is None or _patient[0] is not everyone:
        _patient = everyone, dist.new_group(backend="gloo", timeout=PATIENCE)


def wait_for_all() -> None:
    """Returns when every process is here, however long one of them evaluates or builds a cache.

    The collectives of training keep their own, short, timeout: there a process that hangs is a fault.
    """
    if (group := patient_group()) is not None:
        dist.barrier(group=group)


def patient_group() -> Any:
    """All processes in a group on the hosts without a deadline; None where there is one process alone."""
    prepare_to_wait()
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return _patient[1] if _patient is not None and several else None


def _join_anew(*, on_cpu: bool) -> None:
    """Joins under names of this attempt: the store of torchrun's agent still has the addresses of those that died."""
    store, rank, world_size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    named = dist.PrefixStore(f"attempt-{os.environ[RESTARTS]}", store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo" if on_cpu else None, store=named, rank=rank, world_size=world_size)


def was_restarted() -> bool:
    """Whether torchrun started these processes again after one of them had died (`--max-restarts`)."""
    return int(os.environ.get(RESTARTS, "0")) > 0

"""Runs that write and read checkpoints in shares, in 1, 2 or 3 processes; a script for `test_share_checkpoints.py`."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import socket
import sys
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context

sys.path.insert(0, str(Path(__file__).parents[1]))

from cmapkd.config.disk import DiskError
from cmapkd.training import state
from cmapkd.training.checkpoint import checkpoint_path
from helpers import CMAPKD_EXACT, MemorySource, make_method, make_trainer

STEPS, EVERY, CUT = 6, 2, 4
METHODS: dict[str, dict[str, Any]] = {"cmapkd": CMAPKD_EXACT, "tinyclip": {}}
PATIENCE, GRACE = 120.0, 20.0
GROUPS: tuple[tuple[str, int, str, str], ...] = (  # what a group of processes does: name, size, form, goes on from
    ("whole", 2, "whole", ""),
    ("shares", 2, "shares", ""),
    ("2 on shares", 2, "shares", "shares"),
    ("2 on whole", 2, "shares", "whole"),
    ("2 whole on shares", 2, "whole", "shares"),
    ("3 on shares", 3, "shares", "shares"),
    ("1 on shares", 1, "shares", "shares"),
    ("2 not shared out on shares", 2, "whole", "shares"),
    ("damaged", 2, "shares", "shares"),
    ("full disk", 2, "shares", ""),
    ("two folders", 2, "shares", ""),
)
REFUSED = ("full disk", "two folders")


def train(name: str, method: str, folder: Path, form: str, *, resume: bool) -> dict[str, Any]:
    """What one process tells of its run."""
    optim = {"schedule": "constant", "eps": 1e-2}  # with a small one AdamW enlarges rounding
    trainer = make_trainer(
        folder, make_method(method, settings=METHODS[method]), source=MemorySource(40), steps=STEPS, optim=optim,
        ema=0.8, checkpoint_every=EVERY, batch_size=12, checkpoint_form=form,
        sharding="none" if "not shared out" in name else "fsdp2",
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            trainer.run(resume=resume)
        except DiskError as error:
            if name not in REFUSED:
                raise
            return {"refused": str(error)}
    return {"step": trainer.progress.step, "warned": [str(each.message) for each in warned]}


def work(name: str, rank: int, size: int, form: str, port: int, out: Path, resume: bool) -> None:
    if size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in place.items()}
    if name == "full disk" and rank == 1:  # of the second checkpoint, which this process alone cannot write
        share, calls = state.write_share, []

        def refuse(folder: Path, *others: Any) -> list[Path]:
            found = share(folder, *others)
            calls.append(folder)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            return found

        state.write_share = refuse  # type: ignore[assignment]
    told: dict[str, Any] = {}
    try:
        for method in METHODS:
            place = f"{name}, of the second" if name == "two folders" and rank else name
            told[method] = train(name, method, out / place / method, form, resume=resume)
            if name in REFUSED:
                break
    except Exception:
        told = {"failed": traceback.format_exc()}
        raise
    finally:
        (out / f"{name}, {rank}.json").write_text(json.dumps(told))


def run_group(name: str, size: int, form: str, before: str, out: Path) -> None:
    if before:
        shutil.copytree(out / before, out / name)
        for method in METHODS:
            folder = out / name / method / "checkpoints"
            if name == "damaged":  # in what the second process wrote, and reads
                share = sorted(checkpoint_path(folder, STEPS).glob("shard-*"))[1]
                data = bytearray(share.read_bytes())
                data[-1] ^= 1
                share.write_bytes(data)
            else:
                shutil.rmtree(checkpoint_path(folder, STEPS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    processes = [
        context.Process(target=work, args=(name, rank, size, form, port, out, bool(before))) for rank in range(size)
    ]
    for process in processes:
        process.start()
    wait([process.sentinel for process in processes], PATIENCE)  # the first that ends, or fails
    for process in processes:
        process.join(GRACE)
        process.kill()
        process.join()


def main(out: Path) -> None:
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch: once, before the fork
    gc.freeze()
    for group in GROUPS:
        run_group(*group, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

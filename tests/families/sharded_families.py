"""What each of two processes does for `test_sharded.py`: trains every family whole, then shared out, with an average.

A script, so that importing torch is paid once.
"""

from __future__ import annotations

import copy
import gc
import os
import socket
import sys
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing import get_context

sys.path.insert(0, str(Path(__file__).parent))
from family_support import FAMILIES, all_tensors, make, method_for
from model_support import inputs

from cmapkd.models import DualEncoder, FrozenTeacher, LevelRequest
from cmapkd.training.sharding import shard
from helpers import MemorySource, make_trainer

TWO, STEPS = 2, 2  # the second one moves the average, and an optimizer that has a state
AGAIN = "fsdp2, computed again"
HOW: dict[str, dict[str, Any]] = {
    "none": {},
    "fsdp2": {"sharding": "fsdp2"},
    AGAIN: {"sharding": "fsdp2", "activation_checkpointing": True},
}
# blocks of each library, batch norms, prompts; `test_recompute.py` has every family in one process
COMPUTED_AGAIN = ("tiny", "open_clip", "timm", "hf CLIP", "joined")
TEACHER = "teacher"
FAILED = "failed"
PATIENCE, GRACE = 300.0, 20.0  # seconds for all families, and for a process whose partner has ended


def trained(student: DualEncoder, folder: Path, **training: Any) -> dict[str, Tensor]:
    """The student that would be saved after a few steps, and the weights that a checkpoint would hold."""
    options: dict[str, Any] = {"schedule": "constant", "eps": 1e-2}  # with a small one AdamW enlarges rounding
    trainer = make_trainer(
        folder, method_for(student), source=MemorySource(40), steps=STEPS, optim=options, ema=0.8, **training
    )
    result = trainer.run()
    groups = {f"held/{group}": kept for group, kept in trainer.learned_state().items()}
    if trainer.accelerator.is_main_process:  # the others have no whole student
        groups["student"] = all_tensors(result.student)
    return {f"{group}/{key}": value.clone() for group, tensors in groups.items() for key, value in tensors.items()}


@torch.no_grad()
def answers(teacher: FrozenTeacher) -> dict[str, Tensor]:
    """With all levels, as a step in bf16 has them."""
    model = teacher.model
    every = LevelRequest(*(tuple(info.name for info in infos) for infos in (model.image_levels, model.text_levels)))
    with torch.autocast("cpu", torch.bfloat16):
        features = model(inputs(model), every)
    towers = {"image": features.image, "text": features.text}
    levels = {f"{tower}/{key}": each.values for tower, of in towers.items() for key, each in of.levels.items()}
    return {name: tower.embedding for name, tower in towers.items()} | levels


def shared_teacher(model: DualEncoder) -> dict[str, Tensor]:
    """Answers of a frozen teacher: as it is, with weights held in bf16, and then shared out among the processes."""
    teacher = FrozenTeacher(model)
    found = {f"own/{key}": value for key, value in answers(teacher).items()}
    teacher.hold_in_bf16()
    found |= {f"held/{key}": value for key, value in answers(teacher).items()}
    shard(teacher.model, init_device_mesh("cpu", (TWO,)), keep_root=False)
    found |= {f"shared/{key}": value for key, value in answers(teacher).items()}
    shares = [each for each in teacher.model.parameters() if each.dtype is torch.bfloat16 and isinstance(each, DTensor)]
    return found | {"held and shared": torch.tensor(sum(each.to_local().numel() for each in shares))}


def ways_of(name: str) -> list[str]:
    """What a family is tried in."""
    ways = [how for how in HOW if how != AGAIN or name in COMPUTED_AGAIN]
    return ways if name == "joined" else [*ways, TEACHER]  # a joined model is no teacher


def work(students: dict[str, DualEncoder], rank: int, port: int, out: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": TWO, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()}
    warnings.simplefilter("ignore")
    for name, student in students.items():
        for how in ways_of(name):
            try:
                own = copy.deepcopy(student)
                found: dict[str, Any]
                found = shared_teacher(own) if how == TEACHER else trained(own, out / f"{name}, {how}", **HOW[how])
            except Exception:
                torch.save({FAILED: traceback.format_exc()}, path_of(out, name, how, rank))
                raise
            torch.save(found, path_of(out, name, how, rank))


def path_of(out: Path, name: str, how: str, rank: int) -> Path:
    return out / f"{name}, {how}, rank {rank}.pt"


def run_two(students: dict[str, DualEncoder], out: Path) -> bool:
    """Lets two processes train them, one after the other; whether both came to the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gc.freeze()  # each run of the children looks for circles, and need not look here
    context = get_context("fork")
    processes = [context.Process(target=work, args=(students, rank, port, out)) for rank in range(TWO)]
    for process in processes:
        process.start()
    wait([process.sentinel for process in processes], PATIENCE)  # the first that ends, or fails
    for process in processes:
        process.join(GRACE)
        process.kill()  # one whose partner failed would wait for it
        process.join()
    return all(process.exitcode == 0 for process in processes)


def main(out: Path) -> None:
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch: once, before the fork
    students = {name: make(name, out / name) for name in FAMILIES}  # transformers writes on one process of a group only
    while students and not run_two(students, out):
        begun = [name for name in students if any(out.glob(f"{name}, *.pt"))]
        for name in begun or [*students]:
            del students[name]  # those after a failure get a chance of their own


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Runs of every method whose loss draws, that go on in 1, then 2, then 1 processes; a script for `test_processes.py`.

What is looked at is what every process computes at every step before the optimizer moves the weights: an error is not
hidden by steps that are clipped, decayed or normalised.
"""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).parents[1]))

from cmapkd.data.batches import Batches
from cmapkd.data.ordering import Ordering
from cmapkd.data.types import Batch
from cmapkd.methods import Method
from helpers import CLIP_KD_IN_FULL, CMAPKD_EXACT, LENT, MASKED, MemorySource, Sharded, make_method, make_trainer

STEPS, EVERY = 9, 3  # a checkpoint every third step, and each sitting but the last ends one step after one
SITTINGS = (1, 2, 1)  # processes
FAILED = "failed"
PATIENCE, GRACE = 300.0, 20.0  # seconds for all cases, and for a process whose partner has ended
POLICY = {"name": "policy", "warmup_steps": 1, "window": 2, "edge": 1}
SMALL_BANK: dict[str, Any] = {"bank": {**CMAPKD_EXACT["bank"], "size": 24, "sample": 4}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # name: (method, settings, training)
    "cmapkd, a bank larger than its sample": ("cmapkd", {**CMAPKD_EXACT, **SMALL_BANK}, {}),
    "cmapkd, such a bank in micro-batches": ("cmapkd", {**CMAPKD_EXACT, **SMALL_BANK}, {"micro_batch": 3}),
    "cmapkd, weighted by a policy": ("cmapkd", {**CMAPKD_EXACT, "weighting": POLICY}, {}),
    "c2kd, one prompt at once": ("c2kd", {"prompts_at_once": 1, "agreement": -1.0}, {}),
    "hinton, one prompt at once": ("hinton", {"form": "classes", "prompts_at_once": 1}, {}),
    "contrastive, in windows of shards": ("contrastive", {}, {"ordering": Ordering("window", 4, 2)}),
    "promptkd": ("promptkd", {"distill_weight": 5.0}, {}),
    "tinyclip, learned masks": ("tinyclip", MASKED, {}),
    "tinyclip, units by lot": ("tinyclip", {"masks": {"sparsity": [0.5], "choice": "random"}}, {}),
    "clip_kd, masked pictures": ("clip_kd", CLIP_KD_IN_FULL, {}),
    "clip_rd, lent hints": ("clip_rd", LENT, {}),
    "clip_refine": ("clip_refine", {}, {}),
    "tipsv2, masked cells": ("tipsv2", {"mask_ratio": 0.5, "cells": "masked"}, {}),
    "dmae, a quarter is seen": ("dmae", {}, {}),
    "zscl, templates by lot": ("zscl", {}, {}),
    "trg_token_graph, tokens by lot": ("trg_token_graph", {}, {}),
    "mst_distill, a specialist by lot": ("mst_distill", {"routing": "random"}, {}),
    "albef, a queue": ("albef", {"queue": 24}, {}),
}


FLOAT32 = ("tinyclip, units by lot",)  # a student that was made smaller is made in float32


class _PowerCut(Exception):
    pass


class InFloat64:
    """Batches whose pixels are in float64, as the models are: so errors are not rounding."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.source = batches, batches.source

    def __getitem__(self, plan: Any) -> Batch:
        return self._double(self.batches[plan])

    def join(self, plan: Any, parts: Any) -> Batch:
        return self._double(self.batches.join(plan, parts))

    def _double(self, batch: Batch) -> Batch:
        for role, model_input in batch.inputs.items():
            pixels = self.batches.readers[role].preprocess.to_model(model_input.images)
            object.__setattr__(batch.inputs[role], "images", pixels.double())
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


def in_float64(method: Method) -> None:
    method.to(torch.float64)
    for teacher in method.teachers.values():
        teacher.model.to(torch.float64)


def sitting(case: str, folder: Path, *, first: int, last: int, state: int) -> dict[str, Tensor]:
    """Goes on from step `first`; a power cut ends it when step `last` has been computed, unless that is the run's end.

    Args:
        state: seed of this process's own random state, as it happens to be when the process begins to train.
    Returns:
        `<step>/term/<name>` and `<step>/gradient/<name>` of this process.
    """
    name, settings, training = CASES[case]
    method = make_method(name, settings=settings).train()
    if case not in FLOAT32:
        in_float64(method)
    # eps: with a small one AdamW makes large steps of rounding errors
    optim = {"schedule": "constant", "eps": 1e-2, "max_gradient_norm": None}
    source: MemorySource = MemorySource(40)
    if "ordering" in training:  # two epochs, each of about two windows in every lane; every sitting has other workers
        source = Sharded((9, 14, 3, 11, 0, 6), bad=(3, 30), without_caption=(17,))
        training = {**training, "workers": first % 2 if (first, last) != (1, STEPS) else 0}
    trainer = make_trainer(folder, method, source=source, steps=STEPS, optim=optim, checkpoint_every=EVERY, **training)
    if case not in FLOAT32:
        builder: Batches = InFloat64(trainer.builder)  # type: ignore[assignment]
        trainer.builder = builder
    torch.manual_seed(state)
    found: dict[str, Tensor] = {}
    step = first

    def note_terms(_method: nn.Module, _arguments: Any, _options: Any, terms: Any) -> None:
        found.update({f"{step}/term/{key}": term.value.detach().clone() for key, term in terms.items()})

    def note_gradients(*_arguments: Any) -> None:
        nonlocal step
        gradients = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
        found.update({f"{step}/gradient/{key}": gradient.clone() for key, gradient in gradients.items()})
        step += 1
        if step > last < STEPS:
            raise _PowerCut

    method.register_forward_hook(note_terms, with_kwargs=True)
    handle = register_optimizer_step_pre_hook(note_gradients)
    try:
        trainer.run(resume=first > 1)
    except _PowerCut:
        return found
    finally:
        handle.remove()
    assert step == STEPS + 1
    return found


def bounds(number: int) -> tuple[int, int]:
    """The first and the last step of a sitting; the next one begins after the last checkpoint."""
    final = number == len(SITTINGS) - 1
    return number * EVERY + 1, STEPS if final else (number + 1) * EVERY + 1


def path_of(out: Path, case: str, number: int, rank: int) -> Path:
    return out / f"{case}, sitting {number}, rank {rank}.pt"


def work(cases: list[str], number: int, rank: int, port: int, out: Path) -> None:
    if SITTINGS[number] > 1:
        size = SITTINGS[number]
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in place.items()}
    warnings.simplefilter("ignore")
    first, last = bounds(number)
    for case in cases:
        try:
            found: dict[str, Any] = sitting(case, out / case, first=first, last=last, state=1000 * number + rank)
        except Exception:
            torch.save({FAILED: traceback.format_exc()}, path_of(out, case, number, rank))
            raise
        torch.save(found, path_of(out, case, number, rank))


def run_group(cases: list[str], number: int, out: Path) -> bool:
    """Whether every process came to the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    processes = [
        context.Process(target=work, args=(cases, number, rank, port, out)) for rank in range(SITTINGS[number])
    ]
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
    gc.freeze()  # each run of the children looks for circles, and need not look here
    for number in range(len(SITTINGS)):
        cases = [*CASES]
        while cases and not run_group(cases, number, out):
            begun = [case for case in cases if path_of(out, case, number, 0).exists()]
            cases = cases[max(1, len(begun)) :]  # those after a failure get a chance of their own


if __name__ == "__main__":
    main(Path(sys.argv[1]))
